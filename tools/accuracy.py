#!/usr/bin/env python
"""Compare the peak memory that plans predict with the peak of real training steps.

Each measurement is made in a process of its own: a model is planned for and trained for a few steps with AdamW, and
the peak of a step after warm-up is taken, on CPU from the allocator's events, on CUDA from the counters of the caching
allocator. A cell of the table holds the predicted and the measured peak and the difference; the worst are printed last.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import logging
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import accumulate, product
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

if importlib.util.find_spec("velora_fx") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accuracy_models import CASES, batch_of
from accuracy_table import BOUNDS, Row, as_json, is_within, table, worst

import velora_fx
from velora_fx.peaks import WORKSPACES

GIB = 2**30
WITHIN, EXCEEDED, BAD_INPUT = 0, 1, 2
PLANS = ("nothing", "half", "all")
WARM_UP_STEPS = 2  # the first makes the optimizer's state, and compiles

EPILOG = f"""\
targets:
  eager     the model as it is; within 2% on CPU, 1% of torch.cuda.max_memory_allocated on CUDA
  inductor  torch.compile(model, fullgraph=True); within 3% on CPU, 1% on CUDA

plans:
  nothing   the untouched model
  half      a budget half of the way from the smallest reachable peak to that of the untouched model
  all       the tightest plan there is

models:
  cpu       {", ".join(CASES["cpu"])}
  cuda      {", ".join(CASES["cuda"])}

examples:
  A first look, in a minute:
    python tools/accuracy.py --models llama,mlp --targets eager
  The whole table as markdown, in about an hour on one core:
    OMP_NUM_THREADS=1 python tools/accuracy.py --markdown
  One model in compiled steps at another size:
    python tools/accuracy.py --models gemma3 --targets inductor --plans nothing,all --batch-size 4 --seq-len 512
  A GPU with 80 GB, with the figures kept for a plot:
    python tools/accuracy.py --device cuda --json accuracy.json

exit codes: 0 all differences are within the bounds, 1 one is not or a model failed (its cell says why), 2 bad input"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"accuracy.py: {message} (--help explains)", file=sys.stderr)
        sys.exit(BAD_INPUT)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures as the arguments say and prints the table; returns the exit code."""
    args = parse(argv)
    rows: list[Row] = []
    for row in tqdm(asked_for(args), desc="measuring", unit="step", disable=None, file=sys.stderr):
        rows.append(measure_apart(row))
        if args.json is not None:
            args.json.write_text(as_json(rows))
    print(table(rows, "github" if args.markdown else "simple"), end="\n\n")
    print(*worst(rows), sep="\n")
    return WITHIN if all(is_within(row) for row in rows) else EXCEEDED


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads and checks the arguments."""
    parser = _Parser(
        "accuracy.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", metavar="NAME,NAME", help="of those below (default: all of the device)")
    add("--targets", metavar="NAME,NAME", help="how the steps run (default: eager,inductor)")
    add("--plans", metavar="NAME,NAME", help="what is compressed (default: nothing,half,all)")
    add("--device", choices=tuple(CASES), default="cpu", help="to train on (default: %(default)s)")
    add("--batch-size", type=int, metavar="N", help="texts or images of a batch (default: each model's own)")
    add("--seq-len", type=int, metavar="N", help="tokens of a text (default: each model's own)")
    add("--markdown", action="store_true", help="print the table as markdown")
    add("--json", type=Path, metavar="FILE", help="write every figure, after each measurement")
    args = parser.parse_args(argv)
    allowed = {"models": tuple(CASES[args.device]), "targets": tuple(BOUNDS[args.device]), "plans": PLANS}
    for name, values in allowed.items():
        given = values if getattr(args, name) is None else tuple(getattr(args, name).split(","))
        for unknown in set(given) - set(values):
            parser.error(f"--{name} must be some of {','.join(values)}, got {unknown!r}")
        setattr(args, name, given)
    for name in ("batch_size", "seq_len"):
        if (size := getattr(args, name)) is not None and size < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {size}")
    if args.json is not None and not args.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no folder {args.json.absolute().parent}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that PyTorch can use, and there is none: leave it out to run on CPU")
    return args


def asked_for(args: argparse.Namespace) -> list[Row]:
    """The measurements to make, without figures yet."""
    rows = []
    for name, target, plan in product(args.models, args.targets, args.plans):
        case = CASES[args.device][name]
        length = args.seq_len if args.seq_len is not None and case.length is not None else case.length
        rows.append(Row(name, args.device, target, plan, args.batch_size or case.batch_size, length))
    return rows


def measure_apart(row: Row) -> Row:
    """`measure` in a process of its own, so that no cache, fragment or crash of one reaches another."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, row).result()
        except BrokenProcessPool:
            return replace(row, error="its process died")


def measure(row: Row) -> Row:
    """The row with its figures, or with the reason why there are none."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _measure(row)
    except Exception as error:
        return replace(row, error=" ".join(f"{type(error).__name__}: {error}".split()))


def _measure(row: Row) -> Row:
    torch.manual_seed(0)
    model = CASES[row.device][row.model].make().train()
    model.to(row.device, torch.bfloat16 if row.device == "cuda" else torch.float32)
    batch = batch_of(model, row.batch_size, row.length)
    plan = prepare(model, batch, row.target, row.plan)
    measured, reserved = measured_peak(model, batch, compiled=row.target == "inductor")
    return replace(
        row,
        num_compressed=len(plan.compressed),
        num_candidates=len(plan.decisions),
        moment=plan.planned.moment,
        predicted_bytes=plan.planned.tensor_bytes + plan.planned.overhead.get(WORKSPACES, 0),
        measured_bytes=measured,
        predicted_reserved_bytes=None if reserved is None else plan.planned.peak_bytes,
        reserved_bytes=reserved,
    )


def prepare(model: nn.Module, batch: dict[str, Tensor], target: str, name: str) -> velora_fx.Plan:
    """Applies the plan that `name` (of PLANS) stands for, and returns it."""
    if name == "nothing":
        return velora_fx.plan(model, None, batch, target=target)
    try:
        return velora_fx.plan(model, 1 / GIB, batch, target=target)  # no plan meets one byte
    except velora_fx.BudgetError as error:
        tightest = error.plan
    if name == "all":
        velora_fx.optimize(model, plan=tightest, example_inputs=batch, target=target)
    else:
        budget_bytes = (tightest.planned.peak_bytes + tightest.baseline.peak_bytes) / 2
        velora_fx.optimize(model, budget_bytes / GIB, batch, target=target)
    return velora_fx.plan_of(model)


def measured_peak(model: nn.Module, batch: dict[str, Tensor], compiled: bool) -> tuple[int, int | None]:
    """Peak bytes of a training step, and on CUDA the most that the caching allocator reserved for it."""
    optimizer = torch.optim.AdamW(model.parameters())
    run = torch.compile(model, fullgraph=True) if compiled else model

    def step() -> None:
        output: Any = run(**batch)
        loss = output if isinstance(output, Tensor) else output.loss
        del output
        loss.backward()
        optimizer.step()

    for _ in range(WARM_UP_STEPS):
        step()
        optimizer.zero_grad()
    gc.collect()
    if next(model.parameters()).is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    states = [value for state in optimizer.state.values() for value in state.values()]
    return peak_on_cpu(step, [*model.parameters(), *model.buffers(), *states, *batch.values()]), None


def peak_on_cpu(step: Callable[[], None], held: Iterable[Tensor]) -> int:
    """The most bytes in use during the step: the allocator's events on top of the tensors held before."""
    storages = {id(storage): storage for tensor in held for storage in [tensor.untyped_storage()]}
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports its start and end on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held_bytes = sum(storage.nbytes() for storage in storages.values())
    return held_bytes + max(accumulate((int(event.nbytes()) for event in events), initial=0))


if __name__ == "__main__":
    sys.exit(main())
