#!/usr/bin/env python
"""Measure velora_fx against its rivals, on this machine: time, memory and the error of gradients.

  ops    the operators against a copy of the same bytes, plain ATen, dense products and PEFT's VeLoRA
  step   whole training steps against eager, torch.compile, exact recompute by the compiler, and checkpointing
  lora   steps with LoRA adapters against PEFT's LoRA and PEFT's VeLoRA
  full7b all weights of Llama 7B with AdamW in 24 GiB of a GPU, and what plain PyTorch can do there

Nothing is timed before the operators are checked against float64 on this device. Every time is a median with the
distance between the quartiles (±); every ratio is of one run.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

if importlib.util.find_spec("velora_fx") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_full7b import FULL_CASES, FULL_WAYS, LEAST_STEPS, FullRow, full_rows, full_table
from bench_full7b_train import measure_full_apart
from bench_lora import LORA_CASES, LORA_WAYS
from bench_numerics import fold_complaints, operator_complaints, training_complaints
from bench_ops import OPERATORS, REPEATS, OpRow, measure_op, op_cases
from bench_ops_table import op_tables
from bench_results import Header, append_rows, header_of, require_appendable
from bench_step import STEP_CASES, STEP_WAYS, train_table
from bench_timing import copy_bandwidth
from bench_train import TrainRow, measure_apart, rows_for

DONE, FAILED, BAD_INPUT = 0, 1, 2
TRAINED = {"step": (STEP_WAYS, STEP_CASES, "compile"), "lora": (LORA_WAYS, LORA_CASES, "lora-compiled")}
NAMES: dict[str, tuple[Mapping[str, Any], Mapping[str, Mapping[str, Any]]]] = {
    **{name: (ways, cases) for name, (ways, cases, _) in TRAINED.items()}, "full7b": (FULL_WAYS, FULL_CASES),
}  # fmt: skip
NEEDS: dict[str, dict[str, str]] = {
    "ops": {}, "step": {"transformers": "5.0"}, "lora": {"transformers": "5.0", "peft": "0.20"},
    "full7b": {"transformers": "5.0"},
}  # fmt: skip
STEP_REPEATS = {("cpu", True): 3, ("cpu", False): 10, ("cuda", True): 3, ("cuda", False): 10}
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
  --quick leaves out {", ".join(NOT_QUICK_ROWS)}

models:
  cpu    {", ".join(STEP_CASES["cpu"])}
  cuda   {", ".join(STEP_CASES["cuda"])} (lora: no ViT; --quick: {", ".join(QUICK_CUDA_MODELS)})
  full7b {", ".join(FULL_CASES["cuda"])} on cuda, by default {next(iter(FULL_CASES["cpu"]))} on cpu, or llama-tiny

examples:
  A first look at the operators, in a minute:
    python tools/bench.py ops --quick
  Two ways to train, with more repeats:
    python tools/bench.py step --rows compile,velora-compiled-all --repeats 50
  A GPU with less memory:
    python tools/bench.py step --device cuda --models llama-350m --batch-size 4
  LoRA, with the rows for machines in a folder of its own:
    python tools/bench.py lora --results /tmp/results
  All of Llama 7B in 24 GiB of a GPU; the same in small on a CPU:
    python tools/bench.py full7b --device cuda
    python tools/bench.py full7b --device cpu
  The same GPU with 20 GiB, velora_fx alone, for longer:
    python tools/bench.py full7b --budget-gb 20 --rows velora-factored-compiled --steps 200

exit codes: 0 done, 1 a row failed (its cell says why) or the operators are wrong on this device, 2 bad input
  of full7b the velora row fails if it does not fit, its loss does not fall, or its peak is 5% off the predicted one;
  that another runs out of memory is its result"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"bench.py: {message} (--help explains)", file=sys.stderr)
        sys.exit(BAD_INPUT)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures as the arguments say, appends the rows to a file and prints a table; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    args = parse(given)
    header = header_of(" ".join(["bench.py", *given]), args.device)
    print(header, end="\n\n", flush=True)
    complaints = complaints_of(args)
    if complaints:
        print(
            "bench.py: nothing is timed, the operators are wrong on this device:",
            *complaints,
            sep="\n  ",
            file=sys.stderr,
        )
        return FAILED
    runs = {"ops": run_ops, "full7b": run_full}
    return runs.get(args.benchmark, run_training)(args, header)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads and checks the arguments."""
    parser = _Parser(
        "bench.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parsers = parser.add_subparsers(dest="benchmark", required=True, metavar="ops|step|lora|full7b")
    for name in ("ops", *NAMES):
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
    add("--results", type=Path, metavar="DIR", default=Path(__file__).resolve().parent / "results",
        help="folder of the .jsonl files that rows are appended to (default: tools/results)")  # fmt: skip
    if benchmark == "full7b":
        add("--steps", type=int, metavar="N", default=20, help="of training, in each row (default: %(default)s)")
        add("--budget-gb", type=float, metavar="GIB",
            help="in GiB, with the CUDA context (default: 24 on cuda, on cpu each model's own)")  # fmt: skip
    else:
        add("--quick", action="store_true", help="fewer sizes and repeats: minutes")
        add("--repeats", type=int, metavar="N",
            help="times taken of each row; on CUDA one of a step is the mean of several back to back")  # fmt: skip
    if benchmark != "ops":
        models = "the first of the device" if benchmark == "full7b" else "all of the device"
        add("--models", metavar="NAME,NAME", help=f"of those below (default: {models})")
        add("--batch-size", type=int, metavar="N", help="texts or images of a batch (default: each model's own)")
        add("--seq-len", type=int, metavar="N", help="tokens of a text (default: each model's own)")
    if benchmark in TRAINED:
        add("--sub-token-size", type=int, metavar="M", default=32,
            help="wanted; each width takes its nearest divisor (default: %(default)s)")  # fmt: skip


def _check_names(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Turns lists of names into tuples, all of them by default."""
    allowed: dict[str, tuple[str, ...]] = {"rows": OPERATORS}
    if args.benchmark != "ops":
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
            chosen = QUICK_CUDA_MODELS if name == "models" and args.device == "cuda" else chosen
        setattr(args, name, chosen)


def complaints_of(args: argparse.Namespace) -> list[str]:
    """What is wrong with what is about to be timed; nothing if all is well."""
    try:
        if args.benchmark == "ops":
            return operator_complaints(op_cases(args.device, args.quick), args.device)
        if args.benchmark == "full7b":
            return [*fold_complaints(args.device), *training_complaints(args.device, "")]
        return training_complaints(args.device, "lora" if args.benchmark == "lora" else "")
    except Exception as error:  # an operator that cannot run is as wrong as one with wrong results
        return [f"{type(error).__name__}: {error}"]
    finally:
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()


def run_ops(args: argparse.Namespace, header: Header) -> int:
    """Times the operators."""
    repeats = args.repeats or REPEATS[args.device, args.quick]
    bandwidth = copy_bandwidth(args.device, repeats)
    print(f"copy bandwidth    {bandwidth / 1e9:.1f} GB/s, read plus written\n", flush=True)
    cases = op_cases(args.device, args.quick)
    asked = [OpRow(operator, args.device, case, bandwidth, repeats) for operator in args.rows for case in cases]
    rows = _measured(asked, measure_op, args, header)
    return _finish(rows, op_tables(rows))


def run_training(args: argparse.Namespace, header: Header) -> int:
    """Times training steps, each row in a process of its own."""
    ways, cases, over = TRAINED[args.benchmark]
    sizes = {
        model: (args.batch_size or batch_size, length and (args.seq_len or length))
        for model, (batch_size, length) in cases[args.device].items()
        if model in args.models
    }
    common = {
        "device": args.device,
        "sub_token_size": args.sub_token_size,
        "repeats": args.repeats or STEP_REPEATS[args.device, args.quick],
    }
    asked = list(rows_for({name: ways[name] for name in args.rows}, sizes, common))
    rows = _measured(asked, measure_apart, args, header)
    return _finish(rows, train_table(rows, over))


def run_full(args: argparse.Namespace, header: Header) -> int:
    """Trains inside the budget, each row in a process of its own."""
    rows = _measured(full_rows(args), measure_full_apart, args, header)
    return _finish(rows, full_table(rows))


def _measured(
    asked: Sequence[Any], measure: Callable[[Any], Any], args: argparse.Namespace, header: Header
) -> list[Any]:
    """The rows with their figures, each appended to the file as soon as it has them."""
    rows: list[OpRow | TrainRow | FullRow] = []
    for row in tqdm(asked, desc=args.benchmark, unit="row", disable=None, file=sys.stderr):
        rows.append(measure(row))
        append_rows(args.results / f"{args.benchmark}.jsonl", header, [{**asdict(rows[-1]), **derived(rows[-1])}])
    return rows


def _finish(rows: Sequence[OpRow | TrainRow | FullRow], table: str) -> int:
    """Tells in full why rows failed, then prints the table, whose cells are short; returns the exit code."""
    failed = [row for row in rows if row.error is not None]
    for row in failed:
        print(f"bench.py: failed: {row}: {row.error}", file=sys.stderr)
    print(table)
    return FAILED if failed else DONE


def derived(row: OpRow | TrainRow | FullRow) -> dict[str, float | None]:
    """The figures of a row that follow from others."""
    if isinstance(row, OpRow):
        return {"share_of_copy_bandwidth": row.share, "bound_seconds": row.bound_seconds, "over_bound": row.to_bound}
    return {"tokens_per_second": row.tokens_per_second}


if __name__ == "__main__":
    sys.exit(main())
