"""Trains what the arguments ask for, writes the rows down and prints the tables."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tools.bench.results import Header, append_rows, header_of
from tools.quality.arguments import is_for, parse
from tools.quality.data import Tokens, load_tokens
from tools.quality.docstrings import load_docstrings
from tools.quality.fit import fit, fit_text
from tools.quality.publish import publish
from tools.quality.rows import Row, read_rows, those_left
from tools.quality.table import grouped, rate_table, results, tables
from tools.quality.train import run
from tools.quality.ways import TASKS, WAYS, Task
from tools.runs import end_of, run_rows

DONE, FAILED = 0, 1
SEEDS = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Does what the arguments say; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    args = parse(given)
    file = args.results / "quality.jsonl"
    try:
        if args.publish:
            print(*publish(read_rows(file)), sep="\n")
        elif args.fit:
            print(fit_text(fit(read_rows(file))))
        elif args.table:
            show(args, read_rows(file))
        else:
            return train_and_show(args, file, header_of(" ".join(["tools/quality", *given]), args.device))
    except ValueError as error:  # too few rows, no text
        print(f"tools/quality: {error}", file=sys.stderr)
        return FAILED
    return DONE


def train_and_show(args: argparse.Namespace, file: Path, header: Header) -> int:
    """Trains what the arguments ask for and prints the tables of these texts; returns the exit code."""
    print(header, end="\n\n", flush=True)
    until = end_of(args.minutes)
    tokens = {name: _texts_of(task, args.cache) for name, task in TASKS.items() if name in args.tasks}
    failed = train_all(args, file, tokens, header, until)
    for row in failed:
        print(f"tools/quality: failed: {row}: {row.error}", file=sys.stderr)
    corpora = {found.corpus for found in tokens.values()}
    show(args, [row for row in read_rows(file) if row.corpus in corpora])
    return FAILED if failed else DONE


def _texts_of(task: Task, cache: Path) -> Tokens:
    if task.model:
        return load_docstrings(task.model, task.length, cache)
    return load_tokens(task.text, task.shape.words, task.megabytes, cache)


def train_all(
    args: argparse.Namespace, file: Path, tokens: Mapping[str, Tokens], header: Header, until: float
) -> list[Row]:
    """Trains what is not there yet, as far as it ends by `until` of `time.monotonic`; returns the runs that failed."""
    failed: list[Row] = []
    longest: dict[Hashable, float] = {}

    def measure(row: Row) -> Row:
        return run(row, tokens[row.task_name], args.cache)

    def append(row: Row) -> None:
        append_rows(file, header, [asdict(row)])

    def kind(row: Row) -> Hashable:
        return row.task_name, row.steps

    asked = sweep(args, tokens)
    for stage in ("sweep", "equal time") if args.equal_time else ("sweep",):
        if stage == "equal time":
            asked = list(at_equal_time(asked, read_rows(file)))
        done, left = run_rows(those_left(asked, read_rows(file)), measure, append, stage, until, kind, longest)
        failed += [row for row in done if row.error is not None]
        if left:  # ways are not at their best rates yet
            break
    return failed


def sweep(args: argparse.Namespace, tokens: Mapping[str, Tokens]) -> list[Row]:
    """The runs of all ways at all rates, seed by seed."""
    return [
        Row(
            name, TASKS[name], way, WAYS[way], args.device, tokens[name].corpus, seed, rate,
            args.steps or TASKS[name].steps,
        )
        for name in args.tasks
        for seed in range(args.seeds or SEEDS)
        for way in args.ways
        if is_for(way, name)
        for rate in args.rates or TASKS[name].rates
    ]  # fmt: skip


def at_equal_time(asked: Sequence[Row], done: Sequence[Row]) -> Iterator[Row]:
    """Runs of every way but dense, at its best rate, with as many steps as fit into the time of the dense run."""
    keys = {row.key for row in asked}
    for group in grouped(row for row in done if row.key in keys).values():
        seconds = {
            name: statistics.median(row.step_seconds for row in group if row.name == name)
            for name in {row.name for row in group}
        }
        for result in results(group):
            if result.name == "dense":
                continue
            for row in result.rows:
                steps = max(4, round(row.steps * seconds["dense"] / seconds[row.name]))
                yield replace(
                    row, steps=steps, equal_time=True, loss=None, curve=(), step_seconds=0.0, peak_bytes=0, seconds=0.0
                )


def show(args: argparse.Namespace, rows: Sequence[Row]) -> None:
    """Prints the tables of the tasks, and the losses at each rate."""
    shown = [row for row in rows if row.task_name in args.tasks and row.device == args.device]
    if not shown:
        print("there are no rows yet")
        return
    print(tables(shown))
    for (task, _, corpus, steps), group in grouped(shown).items():
        print(f"\n{task}, {steps} steps, text {corpus}: loss at each learning rate\n\n{rate_table(group)}")
    if args.json is not None:
        figures = [
            {
                "task": group[0], "device": group[1], "corpus": group[2], "steps": group[3], "way": result.name,
                "rate": result.rate, "is_edge": result.is_edge, "losses": result.losses,
                "over_dense": result.over_dense, "equal_time": result.equal_time,
            }
            for group, members in grouped(shown).items()
            for result in results(members)
        ]  # fmt: skip
        args.json.write_text(json.dumps(figures, indent=2))
