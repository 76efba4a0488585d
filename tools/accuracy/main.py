"""Compare the peak memory that plans predict with the peak of real training steps.

Each measurement is made in a process of its own: a model is planned for and trained for a few steps with AdamW, and
the peak of a step after warm-up is taken, on CPU from the allocator's events, on CUDA from the counters of the caching
allocator. A cell of the table holds the predicted and the measured peak and the difference; the worst are printed last.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import NoReturn

import torch

from tools.accuracy.measure import PLANS, measure
from tools.accuracy.models import CASES
from tools.accuracy.table import BOUNDS, Row, as_json, is_within, spread, table, worst
from tools.runs import apart, end_of, run_rows

WITHIN, EXCEEDED, BAD_INPUT = 0, 1, 2

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
    python tools/accuracy --models llama,mlp --targets eager
  The whole table as markdown, in about an hour on one core:
    OMP_NUM_THREADS=1 python tools/accuracy --markdown
  One model in compiled steps at another size:
    python tools/accuracy --models gemma3 --targets inductor --plans nothing,all --batch-size 4 --seq-len 512
  A GPU with 80 GB, as much as six minutes are enough for, with the figures kept:
    python tools/accuracy --device cuda --minutes 6 --json accuracy.json

exit codes: 0 all differences are within the bounds, 1 one is not or a model failed (its cell says why), 2 bad input"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"tools/accuracy: {message} (--help explains)", file=sys.stderr)
        sys.exit(BAD_INPUT)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures as the arguments say and prints the table; returns the exit code."""
    args = parse(argv)
    until = end_of(args.minutes)
    found: list[Row] = []

    def append(row: Row) -> None:
        found.append(row)
        if args.json is not None:
            args.json.write_text(as_json(found))

    run = partial(apart, measure, until=until)
    rows, _ = run_rows(asked_for(args), run, append, "accuracy", until, lambda row: (row.model, row.target))
    print(table(rows, "github" if args.markdown else "simple"), end="\n\n")
    print(*spread(rows), *worst(rows), sep="\n")
    return WITHIN if all(is_within(row) for row in rows) else EXCEEDED


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads and checks the arguments."""
    parser = _Parser(
        "tools/accuracy", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
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
    add("--minutes", type=float, metavar="N", help="start no row that would not end within, end one that does not")
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
    if args.minutes is not None and not 0 <= args.minutes < math.inf:
        parser.error(f"--minutes must be at least 0, got {args.minutes:g}")
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
