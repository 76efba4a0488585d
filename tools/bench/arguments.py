"""Measure velora_fx against its rivals, on this machine: time, memory and the error of gradients.

  ops    the operators against a copy of the same bytes, plain ATen, dense products and PEFT's VeLoRA
  step   whole training steps against eager, torch.compile, exact recompute by the compiler, and checkpointing
  lora   steps with LoRA adapters against PEFT's LoRA and PEFT's VeLoRA
  full7b all weights of Llama 7B with AdamW in 24 GiB of a GPU, and what plain PyTorch can do there
  plan   CPU seconds of plans, by model and number of layers, beside the first step of torch.compile
  overhead  eager calls of compressed blocks over those of dense ones

Nothing is timed before the operators are checked against float64 on this device. Every time is a median with the
distance between the quartiles (±); every ratio is of one run.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from tools.bench.full7b import FULL_CASES, FULL_WAYS, LEAST_STEPS
from tools.bench.ops import OPERATORS
from tools.bench.overhead import MODELS
from tools.bench.planning import PLANS, QUICK_PLANS
from tools.bench.results import require_appendable
from tools.bench.ways import LORA_CASES, LORA_WAYS, STEP_CASES, STEP_WAYS

BAD_INPUT = 2
ROWS_ALONE: dict[str, tuple[str, ...]] = {"ops": OPERATORS, "plan": tuple(PLANS), "overhead": tuple(MODELS)}
TRAINED = {"step": (STEP_WAYS, STEP_CASES, "compile"), "lora": (LORA_WAYS, LORA_CASES, "lora-compiled")}
NAMES: dict[str, tuple[Mapping[str, Any], Mapping[str, Mapping[str, Any]]]] = {
    **{name: (ways, cases) for name, (ways, cases, _) in TRAINED.items()}, "full7b": (FULL_WAYS, FULL_CASES),
}  # fmt: skip
NEEDS: dict[str, dict[str, str]] = {
    "ops": {}, "step": {"transformers": "5.0"}, "lora": {"transformers": "5.0", "peft": "0.20"},
    "full7b": {"transformers": "5.0"}, "plan": {"transformers": "5.0"}, "overhead": {"transformers": "5.0"},
}  # fmt: skip
LEAST = {"repeats": 1, "batch_size": 1, "seq_len": 1, "sub_token_size": 2, "steps": LEAST_STEPS}
QUICK_CUDA_MODELS = ("llama-130m",)
NOT_QUICK_ROWS = (
    "compile-budget-0.5", "compile+checkpointing", "velora-compiled-v+down", "velora-compiled-all-exact",
)  # fmt: skip
EPILOG = f"""\
rows:
  ops    {", ".join(OPERATORS)}
  step   {", ".join(STEP_WAYS)}
  lora   {", ".join(LORA_WAYS)}
  full7b {", ".join(FULL_WAYS)}
  plan   {", ".join(PLANS)}
  overhead {", ".join(MODELS)}
  --quick leaves out {", ".join(NOT_QUICK_ROWS)}

models:
  cpu    {", ".join(STEP_CASES["cpu"])}
  cuda   {", ".join(STEP_CASES["cuda"])} (lora: no ViT; --quick: {", ".join(QUICK_CUDA_MODELS)})
  full7b {", ".join(FULL_CASES["cuda"])} on cuda, by default {next(iter(FULL_CASES["cpu"]))} on cpu, or llama-tiny

examples:
  A first look at the operators, in a minute:
    python tools/bench ops --quick
  Two ways to train, with more repeats:
    python tools/bench step --rows compile,velora-compiled-all --repeats 50
  A GPU with less memory:
    python tools/bench step --device cuda --models llama-350m --batch-size 4
  LoRA, with the rows for machines in a folder of its own:
    python tools/bench lora --results /tmp/results
  All of Llama 7B in 24 GiB of a GPU; the same in small on a CPU:
    python tools/bench full7b --device cuda
    python tools/bench full7b --device cpu
  The same GPU with 20 GiB, velora_fx alone, for longer:
    python tools/bench full7b --budget-gb 20 --rows velora-factored-compiled --steps 200

exit codes: 0 done, 1 a row failed (its cell says why) or the operators are wrong on this device, 2 bad input
  of full7b the velora row fails if it does not fit, its loss does not fall, or its peak is 5% off the predicted one;
  that another runs out of memory is its result"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"tools/bench: {message} (--help explains)", file=sys.stderr)
        sys.exit(BAD_INPUT)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads and checks the arguments."""
    parser = _Parser(
        "tools/bench", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parsers = parser.add_subparsers(dest="benchmark", required=True, metavar="ops|step|lora|full7b|plan|overhead")
    for name in (*ROWS_ALONE, *NAMES):
        _add_arguments(
            parsers.add_parser(name, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter), name
        )
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that PyTorch can use, and there is none: leave it out to run on CPU")
    for package, version in NEEDS[args.benchmark].items():
        if importlib.util.find_spec(package) is None:
            parser.error(f'{args.benchmark} needs {package}: pip install "{package}>={version}"')
    _check_names(parser, args)
    for name, least in LEAST.items():
        if (size := getattr(args, name, None)) is not None and size < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {size}")
    if (budget_gb := getattr(args, "budget_gb", None)) is not None and not 0 < budget_gb < math.inf:
        parser.error(f"--budget-gb must be a positive number of GiB, got {budget_gb:g}")
    try:
        require_appendable(args.results / f"{args.benchmark}.jsonl")
    except OSError as error:
        parser.error(f"--results must be a folder for files of rows: {error}")
    return args


def _add_arguments(parser: argparse.ArgumentParser, benchmark: str) -> None:
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device, help="default here: %(default)s")
    add("--rows", metavar="NAME,NAME", help="of those below (default: all)")
    add("--results", type=Path, metavar="DIR", default=Path(__file__).resolve().parents[1] / "results",
        help="folder of the .jsonl files that rows are appended to (default: tools/results)")  # fmt: skip
    if benchmark == "full7b":
        add("--steps", type=int, metavar="N", default=20, help="of training, in each row (default: %(default)s)")
        add("--budget-gb", type=float, metavar="GIB",
            help="in GiB, with the CUDA context (default: 24 on cuda, on cpu each model's own)")  # fmt: skip
    else:
        add("--quick", action="store_true", help="fewer sizes and repeats: minutes")
        add("--repeats", type=int, metavar="N",
            help="times taken of each row; on CUDA one of a step is the mean of several back to back")  # fmt: skip
    if benchmark not in ROWS_ALONE:
        models = "the first of the device" if benchmark == "full7b" else "all of the device"
        add("--models", metavar="NAME,NAME", help=f"of those below (default: {models})")
        add("--batch-size", type=int, metavar="N", help="texts or images of a batch (default: each model's own)")
        add("--seq-len", type=int, metavar="N", help="tokens of a text (default: each model's own)")
    if benchmark in TRAINED:
        add("--sub-token-size", type=int, metavar="M", default=32,
            help="wanted; each width takes its nearest divisor (default: %(default)s)")  # fmt: skip


def _check_names(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Turns lists of names into tuples, all of them by default."""
    if args.benchmark in ROWS_ALONE:
        allowed = {"rows": ROWS_ALONE[args.benchmark]}
    else:
        ways, cases = NAMES[args.benchmark]
        allowed = {"rows": tuple(ways), "models": tuple(cases[args.device])}
    for name, values in allowed.items():
        given = getattr(args, name)
        chosen = values if given is None else tuple(given.split(","))
        for unknown in set(chosen) - set(values):
            parser.error(f"--{name} must be some of {','.join(values)}, got {unknown!r}")
        if given is None and args.benchmark == "full7b":
            chosen = values[:1] if name == "models" else values
        elif given is None and args.quick:
            chosen = tuple(value for value in chosen if value not in NOT_QUICK_ROWS)
            chosen = QUICK_PLANS if args.benchmark == "plan" else chosen
            chosen = QUICK_CUDA_MODELS if name == "models" and args.device == "cuda" else chosen
        setattr(args, name, chosen)
