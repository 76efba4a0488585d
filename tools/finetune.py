#!/usr/bin/env python
"""Train a byte-level Llama on the source of Python's standard library twice: as is, and by velora_fx in less memory.

Both runs have the same initial weights and the same batches. The output is the plan, both runs' losses, predicted
beside measured peak memory, and the time of a step. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import logging
import sys
import sysconfig
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tabulate import tabulate
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LinearLR
from tqdm import tqdm

if importlib.util.find_spec("velora_fx") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import velora_fx
from velora_fx.peaks import Measured, Peak
from velora_fx.runtime import measured_step

GIB, MIB = 2**30, 2**20
HEAD_SIZE = 64
BUDGET_SHARE = 0.3  # of the way from the smallest reachable peak to that of the untouched model
NOT_PREDICTED = Peak(0, {}, "")  # a measurement takes from a prediction only how gradients come
Texts = list[Tensor]  # batches [batch_size, seq_len] of bytes
HELD_OUT_BATCHES, LAST_STEPS = 8, 10

EXAMPLES = """\
examples:
  The whole story, in about two minutes on two CPU cores:
    python tools/finetune.py
  A first look in seconds, with a smaller model:
    python tools/finetune.py --layers 4 --heads 2 --steps 20
  A budget of your own; where no plan meets it, the error names the smallest peak there is:
    python tools/finetune.py --budget-gb 0.56
  Is it the learning rate? Give both runs the same one:
    python tools/finetune.py --lr 1e-3 --velora-lr 1e-3
  A GPU: 480 million parameters in bfloat16, compiled, the numbers kept for a plot:
    python tools/finetune.py --device cuda --dtype bfloat16 --compile --layers 24 --heads 20 \\
        --batch-size 16 --seq-len 1024 --lr 2e-4 --velora-lr 4e-4 --steps 200 --json run.json"""


class Run(NamedTuple):
    """Training losses, held-out loss before and after, peak bytes in use (on CUDA also reserved), fastest step."""

    losses: list[float]
    held_out: tuple[float, float]
    peaks: list[int]
    step_seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    """Trains both models as the arguments say; returns the exit code."""
    args = parse(argv)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    texts, held_out = load_batches(args)
    example = dict.fromkeys(("input_ids", "labels"), texts[0].to(args.device))
    try:
        budget_gb = choose_budget(args, example)
    except ValueError as error:
        print(f"finetune.py: {error}", file=sys.stderr)
        return 2
    dense = train("dense", *make_model(args, args.lr), texts, held_out, args.compile)
    model, optimizer = make_model(args, args.velora_lr)
    options = {"method": "compress", "compiled": args.compile, "optimizer": optimizer}
    velora_fx.optimize(model, budget_gb, example, seed=args.seed, **options)
    plan = velora_fx.plan_of(model)
    print(plan, end="\n\n")
    velora = train("velora_fx", model, optimizer, texts, held_out, args.compile)
    report(args, dense, velora, plan)
    if args.json is not None:
        found = {"settings": vars(args), "plan": plan.to_dict(), "dense": dense._asdict(), "velora": velora._asdict()}
        args.json.write_text(json.dumps(found, indent=2, default=str))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads and checks the arguments."""
    parser = argparse.ArgumentParser(
        "finetune.py", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=40, metavar="N", help="of training, in each run (default: %(default)s)")
    add("--batch-size", type=int, default=8, metavar="N", help="texts in a batch (default: %(default)s)")
    add("--seq-len", type=int, default=256, metavar="N", help="bytes of a text (default: %(default)s)")
    add("--layers", type=int, default=12, metavar="N", help="of the Llama (default: %(default)s)")
    add("--heads", type=int, default=4, metavar="N", help=f"its width: heads of {HEAD_SIZE} (default: %(default)s)")
    add("--budget-gb", type=float, metavar="GIB", help="of the velora_fx run, in GiB (default: one that is tight)")
    add("--lr", type=float, default=1e-3, help="learning rate of the dense run (default: %(default)s)")
    add("--velora-lr", type=float, default=2e-3, metavar="LR", help="of the velora_fx run (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="to train on (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (default: %(default)s)")
    add(
        "--compile",
        action="store_true",
        help="torch.compile(fullgraph=True) both models, and plan for that",
    )
    add("--seed", type=int, default=0, metavar="N", help="of weights, batches and projections (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the settings, the plan and the numbers of both runs")
    args = parser.parse_args(argv)
    for name, least in {"steps": 2, "batch_size": 1, "seq_len": 2, "layers": 1, "heads": 1}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that PyTorch can use, and there is none: leave it out to run on CPU")
    return args


def load_batches(args: argparse.Namespace) -> tuple[Texts, Texts]:
    """A batch [batch_size, seq_len] of bytes for each step, and some of the files held out, which are every tenth."""
    files = [file.read_bytes() for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    train_files = [file for index, file in enumerate(files) if index % 10]
    generator = torch.Generator().manual_seed(args.seed)
    batches: list[Texts] = []
    for part, count in ((train_files, args.steps), (files[::10], HELD_OUT_BATCHES)):
        text = torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8)
        starts = torch.randint(len(text) - args.seq_len, (count, args.batch_size, 1), generator=generator)
        batches.append([text[start + torch.arange(args.seq_len)].long() for start in starts])
    return batches[0], batches[1]


def make_model(args: argparse.Namespace, learning_rate: float) -> tuple[torch.nn.Module, Optimizer]:
    """A Llama over bytes, the same for the same seed, and its optimizer."""
    torch.manual_seed(args.seed)
    sizes = {"hidden_size": args.heads * HEAD_SIZE, "intermediate_size": -(-args.heads * 8 // 3) * HEAD_SIZE}
    counts = {"num_hidden_layers": args.layers, "num_attention_heads": args.heads, "vocab_size": 256}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **counts))
    # At the default of 0.02 the embeddings drown in what the first layers add to them, and the loss stalls.
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    model.to(args.device, getattr(torch, args.dtype)).train()
    return model, AdamW(model.parameters(), lr=learning_rate)


def choose_budget(args: argparse.Namespace, example: dict[str, Tensor]) -> float:
    """The budget that was asked for, or one that needs compression; BudgetError if no plan meets the former."""
    model, optimizer = make_model(args, args.velora_lr)
    try:
        budget_gb = 1 / GIB if args.budget_gb is None else args.budget_gb
        velora_fx.plan(model, budget_gb, example, method="compress", compiled=args.compile, optimizer=optimizer)
    except velora_fx.BudgetError as error:
        if args.budget_gb is not None:
            raise
        smallest, untouched = error.smallest_peak_bytes, error.plan.baseline.peak_bytes
        budget_bytes = smallest + int(BUDGET_SHARE * (untouched - smallest))
        limits = f"the smallest reachable peak ({smallest / MIB:.1f}) and the untouched model's ({untouched / MIB:.1f})"
        print(f"budget: {budget_bytes / MIB:.1f} MiB, between {limits}; --budget-gb sets another\n")
        return budget_bytes / GIB
    return float(args.budget_gb)


def train(name: str, model: Any, optimizer: Optimizer, texts: Texts, held_out: Texts, compiled: bool) -> Run:
    """Trains on one batch after the other; the step in the middle has its memory measured."""
    gc.collect()
    warmup = LinearLR(optimizer, start_factor=0.1, total_iters=max(1, len(texts) // 10))
    runner = torch.compile(model, fullgraph=True) if compiled else model
    before = evaluate(model, held_out)
    losses, seconds, found = [], [], list[Measured]()
    for index, text in enumerate(tqdm(texts, desc=name, disable=None)):
        ids = text.to(model.device)
        optimizer.zero_grad(set_to_none=True)
        start = time.perf_counter()
        step = measured_step(model, NOT_PREDICTED, ids.device.type, found.append)
        with step if index == len(texts) // 2 else nullcontext():
            loss = runner(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.item()))
        seconds.append(time.perf_counter() - start)
        del loss  # else it is freed in the next step, which may be the measured one
        warmup.step()
    peaks = [size for size in (found[0].allocated_bytes, found[0].reserved_bytes) if size is not None]
    return Run(losses, (before, evaluate(model, held_out)), peaks, min(seconds))


@torch.no_grad()
def evaluate(model: Any, held_out: Texts) -> float:
    """The mean loss."""
    model.eval()
    losses = [float(model(input_ids=ids, labels=ids).loss) for ids in (text.to(model.device) for text in held_out)]
    model.train()
    return sum(losses) / len(losses)


def report(args: argparse.Namespace, dense: Run, velora: Run, plan: velora_fx.Plan) -> None:
    """Prints both runs side by side, and what to make of them."""
    runs, last, peaks = (dense, velora), min(LAST_STEPS, args.steps), (plan.baseline, plan.planned)
    predicted = [peak.tensor_bytes for peak in peaks]
    rows = [
        ("learning rate", f"{args.lr:g}", f"{args.velora_lr:g}"),
        ("training loss, first step", *(f"{run.losses[0]:.4f}" for run in runs)),
        (f"training loss, last {last} steps", *(f"{sum(run.losses[-last:]) / last:.4f}" for run in runs)),
        ("held-out loss before", *(f"{run.held_out[0]:.4f}" for run in runs)),
        ("held-out loss after", *(f"{run.held_out[1]:.4f}" for run in runs)),
        (
            "peak predicted, MiB",
            *(f"{size / MIB:.1f}" for size in predicted),
        ),
        ("peak measured, MiB", *(f"{run.peaks[0] / MIB:.1f}" for run in runs)),
        ("predicted over measured", *(f"{p / r.peaks[0] - 1:+.2%}" for p, r in zip(predicted, runs, strict=True))),
        ("fastest step, ms", *(f"{run.step_seconds * 1e3:.0f}" for run in runs)),
    ]
    if args.device == "cuda":
        rows.append(("predicted with overhead, MiB", *(f"{peak.peak_bytes / MIB:.1f}" for peak in peaks)))
        rows.append(("reserved, MiB", *(f"{run.peaks[1] / MIB:.1f}" for run in runs)))
    print(tabulate(rows, ("", "dense", "velora_fx"), colalign=("left", "right", "right"), disable_numparse=True))
    print(
        f"\nmemory: the measured peak is {1 - velora.peaks[0] / dense.peaks[0]:.1%} lower\n"
        f"time:   {velora.step_seconds / dense.step_seconds:.2f} of a dense step's (fair on an idle machine only)\n"
        f"loss:   bit-equal at the first step, for the forward is exact: {dense.losses[0] == velora.losses[0]}\n"
        "rates:  approximate gradients want a higher one, so each run has its own, by default the best of four;\n"
        "        so short a run shows that both models learn, not which one ends lower"
    )


if __name__ == "__main__":
    sys.exit(main())
