"""The measurements of tools/accuracy, as a table and for machines."""

from __future__ import annotations

import json
import platform
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from tabulate import tabulate

MIB = 2**20
BOUNDS = {"cpu": {"eager": 0.02, "inductor": 0.03}, "cuda": {"eager": 0.01, "inductor": 0.01}}
LONGEST_CELL = 60


@dataclass(frozen=True)
class Row:
    """One measurement.

    `predicted_bytes` compares with `measured_bytes`: on CUDA both hold the cuBLAS workspaces, which are allocated as
    tensors are. `predicted_reserved_bytes` has the plan's whole overhead, and compares with `reserved_bytes`, what the
    caching allocator had reserved, which does not see the CUDA context. `error` says why there are no figures.
    """

    model: str
    device: str
    target: str
    plan: str
    batch_size: int
    length: int | None
    num_compressed: int = 0
    num_candidates: int = 0
    moment: str = ""
    predicted_bytes: int = 0
    measured_bytes: int = 0
    predicted_reserved_bytes: int | None = None
    reserved_bytes: int | None = None
    error: str | None = None

    def __str__(self) -> str:
        return f"{self.model}, {self.target}, {self.plan}"

    @property
    def difference(self) -> float:
        """(predicted - measured) / measured."""
        return (self.predicted_bytes - self.measured_bytes) / self.measured_bytes


def is_within(row: Row) -> bool:
    """True for a measurement that succeeded and is within the bound of its target."""
    return row.error is None and abs(row.difference) <= BOUNDS[row.device][row.target]


def table(rows: Sequence[Row], style: str) -> str:
    """A line for each model and target, a column for each plan, in the style of that name of tabulate's."""
    plans = list(dict.fromkeys(row.plan for row in rows))
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        batch = str(row.batch_size) if row.length is None else f"{row.batch_size} x {row.length}"
        lines.setdefault((row.model, batch, row.target), {})[row.plan] = cell(row)
    headers = ("model", "batch", "target", *(f"{plan}: predicted / measured MiB" for plan in plans))
    body = [(*head, *(cells.get(plan, "") for plan in plans)) for head, cells in lines.items()]
    return tabulate(body, headers, tablefmt=style, disable_numparse=True)


def cell(row: Row) -> str:
    """Predicted and measured MiB with the difference, or the reason why there are none."""
    if row.error is not None:
        return textwrap.shorten(row.error.replace("|", "/"), LONGEST_CELL, placeholder=" ...")
    text = f"{row.predicted_bytes / MIB:.1f} / {row.measured_bytes / MIB:.1f} ({row.difference:+.2%})"
    if row.reserved_bytes is None or row.predicted_reserved_bytes is None:
        return text
    reserved = f"{row.predicted_reserved_bytes / MIB:.1f} / {row.reserved_bytes / MIB:.1f}"
    return f"{text}, with overhead / reserved {reserved}"


def spread(rows: Sequence[Row]) -> list[str]:
    """A line for each target: the differences' least, median and largest, and how many peaks were underestimated."""
    lines = []
    for target in dict.fromkeys(row.target for row in rows):
        found = [row.difference for row in rows if row.target == target and row.error is None]
        if found:
            below = sum(difference < 0 for difference in found)
            figures = " / ".join(f"{each(found):+.2%}" for each in (min, statistics.median, max))
            lines.append(f"{target}: min / median / max {figures}; {below} of {len(found)} below the measured peak")
    return lines


def worst(rows: Sequence[Row]) -> list[str]:
    """What failed, in full, and then a line for each target: its worst difference beside the bound."""
    failed = [row for row in rows if row.error is not None]
    lines = [f"failed: {row}: {row.error}" for row in failed]
    for target in dict.fromkeys(row.target for row in rows):
        measured = [row for row in rows if row.target == target and row.error is None]
        if measured:
            row = max(measured, key=lambda row: abs(row.difference))
            bound = BOUNDS[row.device][target]
            verdict = f"{'within' if is_within(row) else 'exceeds'} {bound:.0%}"
            lines.append(
                f"{target}: worst |predicted - measured| / measured {abs(row.difference):.2%} "
                f"({row.model}, {row.plan}), {verdict}"
            )
    return lines


def as_json(rows: Sequence[Row]) -> str:
    """Every figure, with the versions it was made with."""
    threads, device = torch.get_num_threads(), platform.processor() or platform.machine()
    if rows[0].device == "cuda":
        device = torch.cuda.get_device_name()
    figures = [{**asdict(row), "difference": None if row.error else row.difference} for row in rows]
    versions = {"torch": torch.__version__, "device": device, "threads": threads}
    return json.dumps({**versions, "bounds": BOUNDS[rows[0].device], "rows": figures}, indent=2)
