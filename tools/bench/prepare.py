"""`tools/bench prepare`: the plans of the rows of step, lora and full7b, made ahead and kept as files."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

from tqdm import tqdm

from tools.bench import full7b_train, train
from tools.bench.arguments import NAMES
from tools.bench.full7b import LEAST_STEPS, FullRow, full_rows
from tools.bench.plan_files import write_plan
from tools.bench.results import markdown, reason_of
from tools.bench.train import TrainRow
from tools.bench.ways import SUB_TOKEN_SIZE, training_rows

GIB = 2**30
DONE, FAILED = 0, 1
Planned: TypeAlias = TrainRow | FullRow
HEADERS = ("plan", "fits", "peak, GiB", "file, KB", "wall s", "CPU s")


@dataclass(frozen=True)
class Prepared:
    """A plan that was made and written, or the reason why not: wall and CPU seconds of making it and the model."""

    name: str
    fits: bool = False
    peak_bytes: int = 0
    file_bytes: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    error: str | None = None


def prepare(args: argparse.Namespace) -> int:
    """Plans for what the arguments ask for, on all cores, and prints a table; returns the exit code."""
    compiled_first = sorted(rows_to_plan(args), key=lambda row: not row.way.compiled)  # they take longest
    rows = {row.plan_name: row for row in compiled_first}
    start = time.perf_counter()
    workers = min(len(rows), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        running = pool.map(partial(prepare_row, plans=args.plans), rows.values())
        done = list(tqdm(running, "prepare", len(rows), unit="plan", disable=None, file=sys.stderr))
    wall = time.perf_counter() - start
    for each in done:
        if each.error is not None:
            print(f"tools/bench: failed: {each.name}: {each.error}", file=sys.stderr)
    print(markdown(HEADERS, map(_cells, done)))
    cpu = sum(each.cpu_seconds for each in done)
    print(f"\n{len(done)} plans in {wall:.0f} s, {cpu:.0f} s of CPU time, on {workers} cores")
    return FAILED if any(each.error is not None for each in done) else DONE


def rows_to_plan(args: argparse.Namespace) -> Iterator[Planned]:
    """The rows that have a plan, at each model's own sizes."""
    own = {"batch_size": None, "seq_len": None, "budget_gb": None, "sub_token_size": SUB_TOKEN_SIZE}
    never = {"steps": LEAST_STEPS, "repeats": 1}  # a plan is for any number of them
    for benchmark in args.of:
        ways, cases = NAMES[benchmark]
        models = [model for model in cases[args.device] if model in args.models]
        asked = argparse.Namespace(
            benchmark=benchmark, device=args.device, models=models, rows=list(ways), **own, **never
        )
        rows = full_rows(asked) if benchmark == "full7b" else training_rows(asked)
        yield from (row for row in rows if row.way.is_planned)


def prepare_row(row: Planned, plans: Path) -> Prepared:
    """Makes and writes the plan of a row."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        plan = full7b_train.plan_ahead(row) if isinstance(row, FullRow) else train.plan_ahead(row)
        size = write_plan(plans, row.plan_name, plan)
    except Exception as error:
        return Prepared(row.plan_name, error=reason_of(error))
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    return Prepared(row.plan_name, plan.fits, plan.planned.peak_bytes, size, seconds, cpu_seconds)


def _cells(done: Prepared) -> list[str]:
    if done.error is not None:
        return [done.name, "failed", *["-"] * (len(HEADERS) - 2)]
    fits = "yes" if done.fits else "NO"
    peak, size = f"{done.peak_bytes / GIB:.4g}", f"{done.file_bytes / 1e3:.0f}"
    return [done.name, fits, peak, size, f"{done.seconds:.1f}", f"{done.cpu_seconds:.1f}"]
