"""Chooses a compression level for each item so that every peak fits, at the least cost."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array


@dataclass(frozen=True)
class Item:
    """Something that can be compressed: `savings[l]` bytes at `costs[l]` for level l + 1, both growing with l.

    Level 0 keeps it whole. Items of one `group` are alike, the one that lives longest first: a later one is never
    compressed more than an earlier one, so that plans are regular.
    """

    group: Hashable
    savings: tuple[int, ...]
    costs: tuple[float, ...]


@dataclass(frozen=True)
class Moment:
    """A stretch of the step: its highest bytes with nothing compressed, and how often each item (by index) is alive."""

    peak_bytes: int
    alive: tuple[tuple[int, int], ...]

    def bytes_at(self, items: Sequence[Item], levels: Sequence[int]) -> int:
        """The bytes of this moment under the given levels."""
        return self.peak_bytes - sum(
            count * items[index].savings[levels[index] - 1] for index, count in self.alive if levels[index]
        )


def choose(items: Sequence[Item], moments: Sequence[Moment], budget_bytes: int) -> tuple[int, ...] | None:
    """Levels of least total cost such that no moment is above the budget; None if there are none.

    A 0-1 program for HiGHS: variable (i, l) is 1 where item i is compressed at least to level l + 1.
    """
    if not items:
        return () if all(moment.peak_bytes <= budget_bytes for moment in moments) else None
    starts = np.cumsum([0, *(len(item.savings) for item in items)])
    binding = [moment for moment in _undominated(moments) if moment.peak_bytes > budget_bytes]
    if not binding:
        return (0,) * len(items)
    rows = [_saving_row(items, moment, starts) for moment in binding]
    # Bytes in the units of the largest excess: HiGHS works with absolute tolerances.
    unit = max(moment.peak_bytes - budget_bytes for moment in binding)
    excess = np.array([(moment.peak_bytes - budget_bytes) / unit for moment in binding])
    order = _order_rows(items, starts)
    data = [entry for row in rows for entry in row]
    savings = csr_array(
        (
            [saving / unit for _, saving in data],
            ([r for r, row in enumerate(rows) for _ in row], [column for column, _ in data]),
        ),
        shape=(len(rows), starts[-1]),
    )
    constraints = [LinearConstraint(savings, excess, np.inf)]
    if order:
        constraints.append(LinearConstraint(_difference_rows(order, int(starts[-1])), 0, np.inf))
    costs = np.concatenate([np.diff([0.0, *item.costs]) for item in items])
    result = milp(
        costs / costs.max(),
        integrality=np.ones(starts[-1]),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 1e-4, "time_limit": 20.0},
    )
    if result.x is None:
        return None
    chosen = np.round(result.x).astype(int)
    levels = [int(chosen[starts[i] : starts[i + 1]].sum()) for i in range(len(items))]
    over = max(moment.bytes_at(items, levels) for moment in binding) - budget_bytes
    if over > 0:  # within the solver's relative tolerance, but not to the byte
        return choose(items, moments, budget_bytes - over - math.ceil(unit * 2e-6)) if over <= unit * 1e-5 else None
    return _trimmed(items, binding, budget_bytes, levels)


def _trimmed(items: Sequence[Item], moments: Sequence[Moment], budget_bytes: int, levels: list[int]) -> tuple[int, ...]:
    """Lowers every level that the budget does not need: the solver stops within a relative gap of the optimum."""
    counts = [dict(moment.alive) for moment in moments]
    slack = [budget_bytes - moment.bytes_at(items, levels) for moment in moments]
    following: dict[Hashable, int] = {}
    for index in reversed(range(len(items))):
        item = items[index]
        floor = following.get(item.group, 0)
        while levels[index] > floor:
            lower = levels[index] - 1
            growth = item.savings[lower] - (item.savings[lower - 1] if lower else 0)
            extra = [count.get(index, 0) * growth for count in counts]
            if any(more > free for more, free in zip(extra, slack, strict=True)):
                break
            slack = [free - more for more, free in zip(extra, slack, strict=True)]
            levels[index] = lower
        following[item.group] = levels[index]
    return tuple(levels)


def _saving_row(items: Sequence[Item], moment: Moment, starts: np.ndarray) -> list[tuple[int, int]]:
    row = []
    for index, count in moment.alive:
        previous = 0
        for level, saving in enumerate(items[index].savings):
            row.append((int(starts[index]) + level, count * (saving - previous)))
            previous = saving
    return row


def _order_rows(items: Sequence[Item], starts: np.ndarray) -> list[tuple[int, int]]:
    """Pairs (a, b) of variables with a >= b: levels of one item, and equal levels along a group."""
    pairs = []
    last: dict[Hashable, int] = {}
    for index, item in enumerate(items):
        pairs += [(int(starts[index]) + level, int(starts[index]) + level + 1) for level in range(len(item.costs) - 1)]
        before = last.get(item.group)
        if before is not None:
            pairs += [(int(starts[before]) + level, int(starts[index]) + level) for level in range(len(item.costs))]
        last[item.group] = index
    return pairs


def _difference_rows(pairs: list[tuple[int, int]], width: int) -> csr_array:
    rows = np.repeat(np.arange(len(pairs)), 2)
    return csr_array(([1.0, -1.0] * len(pairs), (rows, np.array(pairs).ravel())), shape=(len(pairs), width))


def _undominated(moments: Sequence[Moment]) -> list[Moment]:
    """Drops each moment that is lower than one at which no more items are alive."""
    kept: list[Moment] = []
    for moment in sorted(moments, key=lambda m: (-m.peak_bytes, len(m.alive))):
        alive = set(moment.alive)
        if not any(alive.issuperset(other.alive) for other in kept):
            kept.append(moment)
    return kept
