"""The rows of tools/quality as tables: each way at its own best rate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tools.bench.results import markdown
from tools.quality.rows import Row
from tools.quality.ways import Way

MIB = 2**20
HEADERS = (
    "way", "M", "weights compressed", "best rate", "seeds", "loss", "over dense", "over dense at equal time", "steps/s",
    "peak, MiB",
)  # fmt: skip
Group = tuple[str, str, str, int]  # task, device, corpus, steps


@dataclass(frozen=True)
class Result:
    """What came of a way: its rows, at equal steps, at the rate whose mean loss is the least; `losses` by seed.

    `is_edge` tells whether that rate is the lowest or highest that was tried, where a wider sweep may find better.
    `equal_time` are losses by seed of runs as long as the dense run. `over_dense` compares seeds that both have.
    """

    name: str
    way: Way
    rate: float
    is_edge: bool
    losses: Mapping[int, float]
    over_dense: Mapping[int, float]
    equal_time: Mapping[int, float]
    rows: tuple[Row, ...]

    @property
    def loss(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.losses.values())


def grouped(rows: Iterable[Row]) -> dict[Group, list[Row]]:
    """The rows that compare with each other: of one task, device, text and number of steps. Those of equal time are
    with the steps of their dense run, which is the last before them."""
    groups: dict[Group, list[Row]] = {}
    ordered = sorted(rows, key=lambda row: row.equal_time)
    for row in ordered:
        if not row.equal_time:
            groups.setdefault((row.task_name, row.device, row.corpus, row.steps), []).append(row)
            continue
        own = [g for g in groups if g[:3] == (row.task_name, row.device, row.corpus)]
        if own:
            groups[min(own, key=lambda group: abs(math.log(group[3] / row.steps)))].append(row)
    return groups


def results(rows: Sequence[Row]) -> list[Result]:
    """What came of each way of one group, as far as it has as many seeds as dense has, at any rate."""
    dense = _at_best_rate([row for row in rows if row.name == "dense"])
    names = dict.fromkeys(row.name for row in rows)
    return [result_of([row for row in rows if row.name == name], dense) for name in names if dense]


def result_of(rows: Sequence[Row], dense: Mapping[int, Row]) -> Result:
    """The result of one way's rows."""
    best = _at_best_rate(rows)
    rate = next(iter(best.values())).rate
    rates = sorted({row.rate for row in rows if not row.equal_time})
    losses = {seed: _loss(row) for seed, row in best.items()}
    return Result(
        name=rows[0].name,
        way=rows[0].way,
        rate=rate,
        is_edge=len(rates) > 1 and rate in (rates[0], rates[-1]),
        losses=losses,
        over_dense={s: losses[s] - _loss(dense[s]) for s in losses if s in dense},
        equal_time={r.seed: _loss(r) - _loss(dense[r.seed]) for r in rows if r.equal_time and r.seed in dense},
        rows=tuple(best.values()),
    )


def _at_best_rate(rows: Sequence[Row]) -> dict[int, Row]:
    """The rows by seed at the rate of the least mean loss, among the rates that have the most seeds."""
    by_rate: dict[float, dict[int, Row]] = {}
    for row in rows:
        if not row.equal_time:
            by_rate.setdefault(row.rate, {})[row.seed] = row
    if not by_rate:
        return {}
    most = max(map(len, by_rate.values()))
    whole = [found for found in by_rate.values() if len(found) == most]
    return min(whole, key=lambda found: statistics.fmean(map(_loss, found.values())))


def _loss(row: Row) -> float:
    return math.inf if row.loss is None or math.isnan(row.loss) else row.loss


def mean_and_spread(values: Iterable[float], style: str = ".3f") -> str:
    """The mean with half the distance between the least and the largest, for a cell."""
    found = list(values)
    if not found:
        return "-"
    mean = format(statistics.fmean(found), style)
    return mean if len(found) == 1 else f"{mean} ±{(max(found) - min(found)) / 2:.3f}"


def tables(rows: Iterable[Row]) -> str:
    """A table for each group, with its title."""
    parts = []
    for (task, device, corpus, steps), group in grouped(rows).items():
        found = results(group)
        if not found:
            continue
        tokens = group[0].task.texts * group[0].task.length
        title = f"{task}, {device}, {steps} steps of {tokens:,} tokens, text {corpus}"
        parts.append(f"{title}\n\n{markdown(HEADERS, map(cells, found))}")
    return "\n\n".join(parts)


def cells(result: Result) -> list[str]:
    """One line of the table."""
    row = result.rows[0]
    is_dense = result.name == "dense"
    return [
        result.name,
        result.way.sizes_text,
        str(row.num_compressed or "-"),
        f"{result.rate:g}{' (edge)' if result.is_edge else ''}",
        str(len(result.losses)),
        mean_and_spread(result.losses.values()),
        "-" if is_dense else mean_and_spread(result.over_dense.values(), "+.3f"),
        "-" if is_dense else mean_and_spread(result.equal_time.values(), "+.3f"),
        f"{1 / statistics.median(r.step_seconds for r in result.rows):.2f}",
        f"{row.peak_bytes / MIB:.1f}",
    ]


def rate_table(rows: Sequence[Row]) -> str:
    """The mean loss of each way of one group at each rate, "-" where there is no run."""
    rates = sorted({row.rate for row in rows if not row.equal_time})
    body = []
    for name in dict.fromkeys(row.name for row in rows):
        losses = {
            rate: [_loss(r) for r in rows if r.name == name and r.rate == rate and not r.equal_time] for rate in rates
        }
        body.append([name, *(mean_and_spread(losses[rate]) for rate in rates)])
    return markdown(["way", *(f"{rate:g}" for rate in rates)], body)
