#!/usr/bin/env python
"""Trains one small Llama twice, as it is and within a memory budget by velora_fx, and prints both side by side."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

if importlib.util.find_spec("velora_fx") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import velora_fx

GIB, MIB = 2**30, 2**20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HEAD_SIZE = 64
BUDGET_SHARE = 0.3  # of the way from the smallest reachable peak to that of the untouched model
LAST_STEPS = 10
HELD_OUT_BATCHES = 8

DESCRIPTION = """\
Train a byte-level Llama on the source of Python's standard library twice: untouched, and with velora_fx.optimize at a
budget below the untouched model's peak. Both runs have the same initial weights and the same batches. Prints the plan,
both losses, predicted beside measured memory, and the step times. Nothing is downloaded."""

EPILOG = """\
examples:
  The whole story in about two minutes on two CPU cores:
    python tools/finetune.py

  A first look in seconds, with a smaller model:
    python tools/finetune.py --layers 4 --hidden-size 128 --steps 20

  A budget of your own; one that no plan meets ends with the smallest peak there is:
    python tools/finetune.py --budget-gb 0.56

  Is it the learning rate? Give both runs the same one:
    python tools/finetune.py --lr 1e-3 --velora-lr 1e-3

  A GPU: about 450 million parameters in bfloat16, compiled, the numbers kept for a plot:
    python tools/finetune.py --device cuda --dtype bfloat16 --layers 24 --hidden-size 1280 --seq-len 1024 \\
        --batch-size 16 --steps 200 --compile --json run.json"""


@dataclass(frozen=True)
class Result:
    """One run: `losses` of the training steps, memory in bytes, `step_seconds` of its fastest step."""

    learning_rate: float
    losses: list[float]
    held_out_before: float
    held_out_after: float
    peak_bytes: int
    reserved_bytes: int | None
    step_seconds: float

    @property
    def last_loss(self) -> float:
        """The mean training loss of the last steps."""
        last = self.losses[-LAST_STEPS:]
        return sum(last) / len(last)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs both trainings as the arguments say; returns the exit code."""
    args = parse(argv)
    train_text, held_out = source_text()
    try:
        budget_gb = choose_budget(args, train_text)
    except ValueError as error:
        print(f"finetune.py: {error}", file=sys.stderr)
        return 2
    dense, _ = train("dense", args, train_text, held_out, args.lr, None)
    velora, plan = train("velora_fx", args, train_text, held_out, args.velora_lr, budget_gb)
    assert plan is not None
    report(args, dense, velora, plan)
    if args.json is not None:
        found = {"settings": {**vars(args), "json": str(args.json)}, "plan": plan.to_dict()}
        args.json.write_text(json.dumps({**found, "dense": asdict(dense), "velora": asdict(velora)}, indent=2))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads and checks the arguments."""
    parser = argparse.ArgumentParser(
        "finetune.py", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=50, help="of training, each run (default: %(default)s)")
    add("--batch-size", type=int, default=8, metavar="N", help="texts in a batch (default: %(default)s)")
    add("--seq-len", type=int, default=256, metavar="N", help="bytes of a text (default: %(default)s)")
    add("--hidden-size", type=int, default=256, metavar="N", help=f"multiple of {HEAD_SIZE} (default: %(default)s)")
    add("--layers", type=int, default=12, metavar="N", help="of the Llama (default: %(default)s)")
    add("--budget-gb", type=float, metavar="GIB", help="of the velora_fx run, in GiB (default: one that is tight)")
    add("--lr", type=float, default=1e-3, help="learning rate of the dense run (default: %(default)s)")
    add("--velora-lr", type=float, default=3e-3, metavar="LR", help="of the velora_fx run (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights (default: %(default)s)")
    add("--compile", action="store_true", help="torch.compile(fullgraph=True) both models")
    add("--seed", type=int, default=0, help="of weights, batches and projections (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the settings, the plan and both runs' numbers")
    args = parser.parse_args(argv)
    for name in ("steps", "batch_size", "seq_len", "hidden_size", "layers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.hidden_size % HEAD_SIZE:
        parser.error(f"--hidden-size must be a multiple of {HEAD_SIZE}, got {args.hidden_size}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, and PyTorch sees none: leave it out to run on CPU")
    return args


def source_text() -> tuple[Tensor, Tensor]:
    """The bytes of the standard library's modules, to train on, and of every tenth file, held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts = [files[:0], files[:0]]
    for index, file in enumerate(files):
        parts[index % 10 == 9].append(file)
    train_text, held_out = (bytearray(b"".join(file.read_bytes() for file in part)) for part in parts)
    return torch.frombuffer(train_text, dtype=torch.uint8), torch.frombuffer(held_out, dtype=torch.uint8)


def batch_at(text: Tensor, starts: Tensor, args: argparse.Namespace) -> dict[str, Tensor]:
    """The texts [batch_size, seq_len] that begin at the given bytes."""
    ids = text[starts[:, None] + torch.arange(args.seq_len)].long().to(args.device)
    return {"input_ids": ids, "labels": ids}


def batches(text: Tensor, args: argparse.Namespace) -> Iterator[dict[str, Tensor]]:
    """Endless random batches, the same for the same seed."""
    generator = torch.Generator().manual_seed(args.seed)
    while True:
        yield batch_at(text, torch.randint(len(text) - args.seq_len, (args.batch_size,), generator=generator), args)


def make_model(args: argparse.Namespace) -> torch.nn.Module:
    """A Llama over bytes, the same for the same seed."""
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=args.hidden_size,
        intermediate_size=-(-args.hidden_size * 8 // 3 // 64) * 64,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // HEAD_SIZE,
        max_position_embeddings=args.seq_len,
    )
    torch.manual_seed(args.seed)
    model = transformers.LlamaForCausalLM(config)
    # Drawn as small as the other weights, 256 rows drown in what the first layers add, and the loss stalls.
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    made: torch.nn.Module = model.to(args.device, DTYPES[args.dtype]).train()
    return made


def choose_budget(args: argparse.Namespace, text: Tensor) -> float:
    """The budget asked for if it can be met, else a BudgetError; without one, a budget that needs compression."""
    model = make_model(args)
    optimizer = torch.optim.AdamW(model.parameters())
    asked = 1 / GIB if args.budget_gb is None else args.budget_gb
    try:
        velora_fx.plan(model, asked, next(batches(text, args)), optimizer=optimizer)
    except velora_fx.BudgetError as error:
        if args.budget_gb is not None:
            raise
        untouched, smallest = error.plan.baseline.peak_bytes, error.smallest_peak_bytes
        budget_bytes = smallest + int(BUDGET_SHARE * (untouched - smallest))
        print(
            f"budget: {budget_bytes / MIB:.1f} MiB, {BUDGET_SHARE:.0%} of the way from the smallest reachable peak "
            f"({smallest / MIB:.1f}) to the untouched model's ({untouched / MIB:.1f}); --budget-gb sets another\n"
        )
        return budget_bytes / GIB
    return asked


def train(
    name: str, args: argparse.Namespace, text: Tensor, held_out: Tensor, learning_rate: float, budget_gb: float | None
) -> tuple[Result, velora_fx.Plan | None]:
    """Trains a new model, within the budget if one is given; the plan is None if none is."""
    model = make_model(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    plan = None
    if budget_gb is not None:
        example = next(batches(text, args))
        velora_fx.optimize(model, budget_gb=budget_gb, example_inputs=example, optimizer=optimizer, seed=args.seed)
        plan = velora_fx.plan_of(model)
        print(plan, end="\n\n")
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=max(1, args.steps // 10))
    runner = torch.compile(model, fullgraph=True) if args.compile else model
    before = evaluate(model, held_out, args)
    losses, seconds, peak, reserved = [], [], 0, None
    for index, batch in zip(tqdm(range(args.steps), desc=name, disable=None), batches(text, args), strict=False):
        optimizer.zero_grad(set_to_none=True)
        step = partial(training_step, runner, optimizer, batch)
        start = time.perf_counter()
        if index == args.steps // 2:
            loss, peak, reserved = measured(step, alive_bytes(model, optimizer, batch), args.device)
        else:
            loss = step()
            seconds.append(time.perf_counter() - start)
        losses.append(loss)
        warmup.step()
    after = evaluate(model, held_out, args)
    return Result(learning_rate, losses, before, after, peak, reserved, min(seconds)), plan


def training_step(
    model: Callable[..., Any], optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]
) -> float:
    """Forward, backward and update; the gradients stay until the next zero_grad."""
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    return float(loss)


@torch.no_grad()
def evaluate(model: torch.nn.Module, text: Tensor, args: argparse.Namespace) -> float:
    """The mean loss on texts spread evenly over the held-out files."""
    starts = torch.linspace(0, len(text) - args.seq_len, HELD_OUT_BATCHES * args.batch_size).long()
    model.eval()
    losses = [float(model(**batch_at(text, part, args)).loss) for part in starts.split(args.batch_size)]
    model.train()
    return sum(losses) / len(losses)


def alive_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> int:
    """Bytes in use before a step: parameters, buffers, the optimizer's state and the batch, each storage once."""
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    tensors = [*model.parameters(), *model.buffers(), *state, *batch.values()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def measured(step: Callable[[], float], alive: int, device: str) -> tuple[float, int, int | None]:
    """A step's loss, the most bytes that the allocator had in use, and the most it reserved (CUDA only).

    On CPU the allocator's own events, as the profiler records them, are summed on top of `alive`, the bytes in use
    before the step.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return step(), torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = step()
    results = profiler.profiler.kineto_results if profiler.profiler is not None else None
    assert results is not None
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda event: event.start_ns())
    return loss, alive + max(accumulate(event.nbytes() for event in events)), None


def report(args: argparse.Namespace, dense: Result, velora: Result, plan: velora_fx.Plan) -> None:
    """Prints both runs side by side, and what to make of it."""
    peaks = [plan.baseline.peak_bytes - plan.overhead_bytes, plan.planned.peak_bytes - plan.overhead_bytes]
    runs = (dense, velora)
    rows = [
        ("learning rate", *(f"{run.learning_rate:g}" for run in runs)),
        ("loss of step 0", *(f"{run.losses[0]:.4f}" for run in runs)),
        (f"loss, mean of the last {min(LAST_STEPS, args.steps)} steps", *(f"{run.last_loss:.4f}" for run in runs)),
        ("held-out loss before", *(f"{run.held_out_before:.4f}" for run in runs)),
        ("held-out loss after", *(f"{run.held_out_after:.4f}" for run in runs)),
        ("peak predicted, MiB", *(f"{peak / MIB:.1f}" for peak in peaks)),
        ("peak measured, MiB", *(f"{run.peak_bytes / MIB:.1f}" for run in runs)),
        ("predicted / measured - 1", *(f"{p / run.peak_bytes - 1:+.1%}" for p, run in zip(peaks, runs, strict=True))),
    ]
    if dense.reserved_bytes is not None and velora.reserved_bytes is not None:
        rows.append(("predicted with overhead, MiB", *(f"{(p + plan.overhead_bytes) / MIB:.1f}" for p in peaks)))
        rows.append(("reserved, MiB", f"{dense.reserved_bytes / MIB:.1f}", f"{velora.reserved_bytes / MIB:.1f}"))
    rows.append(("fastest step, ms", *(f"{run.step_seconds * 1e3:.0f}" for run in runs)))
    aligned = ("left", "right", "right")
    print(tabulate(rows, ("", "dense", "velora_fx"), colalign=aligned, disable_numparse=True), end="\n\n")
    same = "is equal bit for bit" if dense.losses[0] == velora.losses[0] else "differs by rounding (other kernels)"
    ...
