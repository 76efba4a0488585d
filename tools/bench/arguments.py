"""Measure velora_fx against its rivals, on this machine: time, memory and the error of gradients.

  ops    the operators against a copy of the same bytes, plain ATen, dense products and PEFT's VeLoRA
  step   whole training steps against eager, torch.compile, exact recompute by the compiler, and checkpointing
  lora   steps with LoRA adapters against PEFT's LoRA and PEFT's VeLoRA
  full7b all weights of Llama 7B with AdamW in 24 GiB of a GPU, and what else trains it there and on a whole card
  prepare  makes the plans of the rows of step, lora and full7b ahead, on a machine without the GPU
  plan   CPU seconds of plans, by model and number of layers, beside the first step of torch.compile
  overhead  eager calls of compressed blocks over those of dense ones

Nothing is timed before the operators are checked against float64 on this device. Every time is a median with the
distance between the quartiles (±); every ratio is of one run,
with --minutes of runs in one place. Rows come in the order of what they tell.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from tools.bench.full7b import FULL_CASES, FULL_WAYS, LEAST_STEPS
from tools.bench.ops import OPERATORS
from tools.bench.overhead import MODELS
from tools.bench.planning import PLANS, QUICK_PLANS
from tools.bench.results import require_appendable
from tools.bench.ways import LORA_WAYS, STEP_CASES, STEP_WAYS, SUB_TOKEN_SIZE, TRAINED
from tools.quality.data import cache_folder

BAD_INPUT = 2
ROWS_ALONE: dict[str, tuple[str, ...]] = {"ops": OPERATORS, "plan": tuple(PLANS), "overhead": tuple(MODELS)}
NAMES: dict[str, tuple[Mapping[str, Any], Mapping[str, Mapping[str, Any]]]] = {
    "full7b": (FULL_WAYS, FULL_CASES), **{name: (ways, cases) for name, (ways, cases, _) in TRAINED.items()},
}  # fmt: skip
TRANSFORMERS, PEFT = {"transformers": "5.0"}, {"peft": "0.20"}
NEEDS: dict[str, dict[str, str]] = {
    "ops": {}, "step": TRANSFORMERS, "plan": TRANSFORMERS, "overhead": TRANSFORMERS,
    **{name: {**TRANSFORMERS, **PEFT} for name in ("lora", "full7b", "prepare")},
}  # fmt: skip
LEAST = {"minutes": 0, "repeats": 1, "batch_size": 1, "seq_len": 1, "sub_token_size": 2, "steps": LEAST_STEPS}
QUICK_CUDA_MODELS = ("llama-130m",)
NOT_QUICK_ROWS = ("compile-budget-0.5", "compile+checkpointing", "velora-compiled-all-exact")
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
  A GPU for minutes: plans made before, on a machine with the same PyTorch, then as many rows as there is time for;
  the same command goes on where it stopped:
    python tools/bench prepare
    python tools/bench full7b --device cuda --minutes 10 --compile-cache /tmp/compiled
  The same GPU with 20 GiB, velora_fx alone, for longer:
    python tools/bench full7b --budget-gb 20 --rows velora-8 --steps 200

plans:
  A plan is for one version of PyTorch (2.13 for all 2.13.x), whose number names its folder: those of another are not
  taken, and the row plans on the spot, as one without a file does. Where the GPU's machine has another version run
  prepare there, or with that version's package for CPUs elsewhere. Plans made without a GPU count with the rates of an
  A100, and with the code that the compiler makes for a CPU.

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
    parsers = parser.add_subparsers(
        dest="benchmark", required=True, metavar="ops|step|lora|full7b|plan|overhead|prepare"
    )
    for name in (*ROWS_ALONE, *NAMES, "prepare"):
        _add_arguments(
            parsers.add_parser(name, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter), name
        )
    args = parser.parse_args(argv)
    if args.device == "cuda" and args.benchmark != "prepare" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that PyTorch can use, and there is none: leave it out to run on CPU")
    for package, version in NEEDS[args.benchmark].items():
        if importlib.util.find_spec(package) is None:
            parser.error(f'{args.benchmark} needs {package}: pip install "{package}>={version}"')
    if "plans" in args and args.plans is None:
        args.plans = args.results / "plans"
    _check_names(parser, args)
    for name, least in LEAST.items():
        if (size := getattr(args, name, None)) is not None and not least <= size < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {size:g}")
    if (budget_gb := getattr(args, "budget_gb", None)) is not None and not 0 < budget_gb < math.inf:
        parser.error(f"--budget-gb must be a positive number of GiB, got {budget_gb:g}")
    try:
        require_appendable(args.results / f"{args.benchmark}.jsonl")
    except OSError as error:
        parser.error(f"--results must be a folder for files of rows: {error}")
    return args


def _add_arguments(parser: argparse.ArgumentParser, benchmark: str) -> None:
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() or benchmark == "prepare" else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device, help="default here: %(default)s")
    add("--results", type=Path, metavar="DIR", default=Path(__file__).resolve().parents[1] / "results",
        help="folder of the .jsonl files that rows are appended to (default: tools/results)")  # fmt: skip
    if benchmark == "prepare":
        add("--of", metavar="NAME,NAME", help=f"for these benchmarks (default: {','.join(NAMES)})")
    else:
        add("--rows", metavar="NAME,NAME", help="of those below (default: all)")
    if benchmark in ROWS_ALONE or benchmark in TRAINED:
        add("--quick", action="store_true", help="fewer sizes and repeats: minutes")
        add("--repeats", type=int, metavar="N",
            help="times taken of each row; on CUDA one of a step is the mean of several back to back")  # fmt: skip
    if benchmark not in ROWS_ALONE:
        models = {"full7b": "the first of the device", "prepare": "what these benchmarks have by default"}.get(
            benchmark, "all of the device"
        )
        add("--models", metavar="NAME,NAME", help=f"of those below (default: {models})")
        add("--plans", type=Path, metavar="DIR", help="folder of plans made ahead (default: plans in that of results)")
    if benchmark in NAMES:
        _add_training_arguments(add, benchmark)


def _add_training_arguments(add: Callable[..., Any], benchmark: str) -> None:
    add("--batch-size", type=int, metavar="N", help="texts or images of a batch (default: each model's own)")
    add("--seq-len", type=int, metavar="N", help="tokens of a text (default: each model's own)")
    add("--minutes", type=float, metavar="N",
        help="start no row that would not end within, end one that does not, and do not run again what the file has "
        "from this machine, with these versions and at this commit (default: no limit, and all is run)")  # fmt: skip
    add("--compile-cache", type=Path, metavar="DIR",
        help="folder in which compiled code is kept for the next run (default: where PyTorch keeps it)")  # fmt: skip
    if benchmark == "full7b":
        add("--steps", type=int, metavar="N", default=50,
            help="of training at each of two learning rates, in each row (default: %(default)s)")  # fmt: skip
        add("--budget-gb", type=float, metavar="GIB",
            help="in GiB, with the CUDA context (default: 24 on cuda, on cpu each model's own)")  # fmt: skip
        add("--cache", type=Path, metavar="DIR", default=cache_folder(),
            help="folder of the tokens of the text (default: velora_fx/quality in the user's cache)")  # fmt: skip
    else:
        add("--sub-token-size", type=int, metavar="M", default=SUB_TOKEN_SIZE,
            help="wanted; each width takes its nearest divisor (default: %(default)s)")  # fmt: skip


def _check_names(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Turns lists of names into tuples, all of them by default."""
    if args.benchmark in ROWS_ALONE:
        allowed = {"rows": ROWS_ALONE[args.benchmark]}
        default = allowed
    elif args.benchmark == "prepare":
        of = NAMES if args.of is None else [name for name in args.of.split(",") if name in NAMES]
        allowed = {"of": tuple(NAMES), "models": _models(of, args.device, is_default=False)}
        default = {**allowed, "models": _models(of, args.device)}
    else:
        allowed = {"rows": tuple(NAMES[args.benchmark][0]), "models": _models([args.benchmark], args.device, False)}
        default = {**allowed, "models": _models([args.benchmark], args.device)}
    for name, values in allowed.items():
        given = getattr(args, name)
        chosen = default[name] if given is None else tuple(given.split(","))
        for unknown in set(chosen) - set(values):
            parser.error(f"--{name} must be some of {','.join(values)}, got {unknown!r}")
        if given is None and getattr(args, "quick", False):
            chosen = tuple(value for value in chosen if value not in NOT_QUICK_ROWS)
            chosen = QUICK_PLANS if args.benchmark == "plan" else chosen
            chosen = QUICK_CUDA_MODELS if name == "models" and args.device == "cuda" else chosen
        setattr(args, name, chosen)


def _models(benchmarks: Iterable[str], device: str, is_default: bool = True) -> tuple[str, ...]:
    """The models of these benchmarks on a device, each once; by default of full7b the first alone."""
    found: dict[str, None] = {}
    for name in benchmarks:
        models = tuple(NAMES[name][1][device])
        found.update(dict.fromkeys(models[:1] if is_default and name == "full7b" else models))
    return tuple(found)
