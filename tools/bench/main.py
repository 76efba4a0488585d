"""Measures what the arguments ask for, writes it down and prints it."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

from tools.bench.arguments import parse
from tools.bench.full7b import FullRow, full_rows, full_table
from tools.bench.full7b_train import measure_full, real_texts
from tools.bench.numerics import fold_complaints, operator_complaints, tiny_models, training_complaints
from tools.bench.ops import REPEATS, OpRow, measure_op, op_cases
from tools.bench.ops_table import op_tables
from tools.bench.overhead import OverheadRow, measure_overhead, overhead_rows, overhead_table
from tools.bench.planning import PLANS, PlanRow, measure_plan, plan_table
from tools.bench.prepare import prepare
from tools.bench.results import Header, append_rows, header_of, rows_before
from tools.bench.timing import copy_bandwidth
from tools.bench.train import TrainRow, measure
from tools.bench.ways import TRAINED, train_table, training_rows
from tools.runs import apart, end_of, run_rows

DONE, FAILED = 0, 1
AnyRow: TypeAlias = OpRow | TrainRow | FullRow | PlanRow | OverheadRow


def main(argv: Sequence[str] | None = None) -> int:
    """Measures as the arguments say, appends the rows to a file and prints a table; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    args = parse(given)
    args.until = end_of(getattr(args, "minutes", None))
    runs_on = "cpu" if args.benchmark == "prepare" else args.device
    header = header_of(" ".join(["tools/bench", *given]), runs_on)
    print(header, end="\n\n", flush=True)
    if args.benchmark == "prepare":
        return prepare(args)
    complaints = complaints_of(args)
    if complaints:
        print(
            "tools/bench: nothing is timed, the operators are wrong on this device:",
            *complaints,
            sep="\n  ",
            file=sys.stderr,
        )
        return FAILED
    runs = {"ops": run_ops, "full7b": run_full, "plan": run_plan, "overhead": run_overhead}
    return runs.get(args.benchmark, run_training)(args, header)


def complaints_of(args: argparse.Namespace) -> list[str]:
    """What is wrong with what is about to be timed; nothing if all is well."""
    try:
        if args.benchmark == "plan":
            return []
        if args.benchmark == "ops":
            return operator_complaints(op_cases(args.device, args.quick), args.device)
        if args.benchmark == "full7b":
            return [*fold_complaints(args.device), *training_complaints(*tiny_models(args.device, ""))]
        return training_complaints(*tiny_models(args.device, "lora" if args.benchmark == "lora" else ""))
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
    return finish(rows, op_tables(rows))


def run_training(args: argparse.Namespace, header: Header) -> int:
    """Times training steps, each row in a process of its own."""
    rows = _trained(training_rows(args), partial(measure, plans=args.plans), args, header)
    return finish(rows, train_table(rows, TRAINED[args.benchmark][2]))


def run_full(args: argparse.Namespace, header: Header) -> int:
    """Trains inside the budget, each row in a process of its own; the rows of a model have the same texts."""
    asked = full_rows(args)
    rows = []
    for model in args.models:
        of_model = [row for row in asked if row.model == model]
        train = partial(measure_full, texts=real_texts(of_model[0], args.cache), plans=args.plans)
        rows += _trained(of_model, train, args, header)
    return finish(rows, full_table(rows))


def run_plan(args: argparse.Namespace, header: Header) -> int:
    """Plans, one model after the other."""
    rows = _measured([PLANS[name] for name in args.rows], measure_plan, args, header)
    return finish(rows, plan_table(rows))


def run_overhead(args: argparse.Namespace, header: Header) -> int:
    """Times eager calls."""
    asked = overhead_rows(args.rows, args.device, args.repeats or (50 if args.quick else 300))
    rows = _measured(asked, measure_overhead, args, header)
    return finish(rows, overhead_table(rows))


def _trained(
    asked: Sequence[Any], measure: Callable[[Any], Any], args: argparse.Namespace, header: Header
) -> list[Any]:
    """The rows with their figures, in the order they were asked for, each measured in a process of its own.

    With a number of minutes those that an earlier run of it has measured in this place are taken from the file.
    """
    before = rows_before(_file(args), header, asked) if args.minutes is not None else []
    there = [row for row in before if row.error is None]
    left = [row for row in asked if str(row) not in map(str, there)]
    longest: dict[Any, float] = {}
    for row in before:
        longest[_kind(row)] = max(longest.get(_kind(row), 0.0), row.seconds)
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(args.compile_cache.absolute())} if args.compile_cache else {}
    run = partial(apart, measure, until=args.until, environment=environment)
    done, _ = run_rows(left, run, partial(_append, args, header), args.benchmark, args.until, _kind, longest)
    found = {str(row): row for row in (*there, *done)}
    return [found[str(row)] for row in asked if str(row) in found]


def _kind(row: Any) -> tuple[str, bool]:
    """Rows of one kind take about as long."""
    return row.model, row.way.compiled


def _measured(
    asked: Sequence[Any], measure: Callable[[Any], Any], args: argparse.Namespace, header: Header
) -> list[Any]:
    """The rows with their figures."""
    return run_rows(asked, measure, partial(_append, args, header), args.benchmark)[0]


def _append(args: argparse.Namespace, header: Header, row: AnyRow) -> None:
    append_rows(_file(args), header, [{**asdict(row), **derived(row)}])


def _file(args: argparse.Namespace) -> Path:
    file: Path = args.results / f"{args.benchmark}.jsonl"
    return file


def finish(rows: Sequence[AnyRow], table: str) -> int:
    """Tells in full why rows failed, then prints the table, whose cells are short; returns the exit code."""
    failed = [row for row in rows if row.error is not None]
    for row in failed:
        print(f"tools/bench: failed: {row}: {row.error}", file=sys.stderr)
    print(table)
    return FAILED if failed else DONE


def derived(row: AnyRow) -> dict[str, float | None]:
    """The figures of a row that follow from others."""
    if isinstance(row, (PlanRow, OverheadRow)):
        return {}
    if isinstance(row, OpRow):
        return {"share_of_copy_bandwidth": row.share, "bound_seconds": row.bound_seconds, "over_bound": row.to_bound}
    return {"tokens_per_second": row.tokens_per_second}
