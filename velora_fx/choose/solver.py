"""Chooses a compression level for each item so that every peak fits, at the least cost."""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import Bounds, LinearConstraint
from scipy.sparse import csr_array

from velora_fx.choose.highs import milp
from velora_fx.choose.items import Item, Moment, highest_levels, trimmed, with_tied

MAX_SOLUTIONS = 20  # besides one for each moment
MOMENTS_AT_ONCE = 3
MOST_SECONDS = 60.0
RELATIVE_GAP = 1e-4  # within which a cost is the least


@dataclass(frozen=True)
class Program:
    """A 0-1 program for HiGHS: variable (i, l) is 1 where item i is compressed at least to level l + 1."""

    items: Sequence[Item]
    moments: Sequence[Moment]

    def levels_within(self, budget_bytes: int) -> tuple[int, ...] | None:
        """Levels of least total cost such that no moment is above the budget; None if there are none.

        Few of the moments matter: the program has those at which its solutions before were above the budget. The least
        cost is met within RELATIVE_GAP, the budget to the byte.
        """
        items = self.items
        if self.least_bytes > budget_bytes:
            return None
        binding = [each for each in self._undominated if each.most_bytes > budget_bytes]
        moments = [each.moment for each in binding]
        constraints = list(self._order)
        demanded: set[int] = set()
        chosen = np.zeros(self._starts[-1], dtype=int)
        deadline = time.monotonic() + MOST_SECONDS
        for _ in range(MAX_SOLUTIONS + len(binding)):
            levels = _levels(items, self._starts, chosen)
            excess = [moment.bytes_at(items, levels) - budget_bytes for moment in moments]
            over = {index for index, more in enumerate(excess) if more > 0}
            if not over:
                return trimmed(items, moments, budget_bytes, levels)
            missing = sorted(over - demanded, key=lambda index: -excess[index])[:MOMENTS_AT_ONCE]
            constraints += [
                _enough(binding[index].row, moments[index].peak_bytes - budget_bytes, len(chosen)) for index in missing
            ]
            # Those within the solver's tolerance, but not to the byte.
            constraints += [_another(binding[index].row, chosen) for index in over & demanded]
            demanded.update(missing)
            solution = _solve(items, constraints, deadline - time.monotonic())
            if solution is None:
                break
            chosen = _variables(items, _levels(items, self._starts, solution))
        highest = highest_levels(items)
        fits = all(moment.bytes_at(items, highest) <= budget_bytes for moment in moments)
        return trimmed(items, moments, budget_bytes, highest) if fits else None

    def peak_bytes(self, levels: Sequence[int]) -> int:
        """The bytes of the highest moment under the given levels."""
        return max(each.moment.bytes_at(self.items, levels) for each in self._undominated)

    def cost(self, levels: Sequence[int]) -> float:
        """What the levels cost."""
        chosen = zip(self.items, levels, strict=True)
        return math.fsum(item.costs[level - 1] for item, level in chosen if level and item.costs)

    @cached_property
    def least_bytes(self) -> int:
        """What no levels get the highest moment below, were everything that helps it done for it."""
        return max(moment.peak_bytes - _most_saved(self.items, moment) for moment in self.moments)

    @cached_property
    def _undominated(self) -> list[_Row]:
        """The moments that may be the highest."""
        return [_Row(self.items, moment, self._starts) for moment in _undominated(self.items, self.moments)]

    @cached_property
    def _starts(self) -> np.ndarray:
        """The first variable of each item, and the number of all."""
        return np.cumsum([0, *(item.num_variables for item in self.items)])

    @cached_property
    def _order(self) -> list[LinearConstraint]:
        return _order_constraints(self.items, self._starts)


@dataclass(frozen=True)
class _Row:
    """A moment as a row of the program."""

    items: Sequence[Item]
    moment: Moment
    starts: np.ndarray

    @cached_property
    def most_bytes(self) -> int:
        """The most that any levels make of it: some items take more than they free."""
        return self.moment.peak_bytes - sum(
            count * min(0, *self.items[index].savings) for index, count in self.moment.alive
        )

    @cached_property
    def row(self) -> dict[int, int]:
        """What each variable saves, by its column."""
        return _saving_row(self.items, self.moment, self.starts)


def _levels(items: Sequence[Item], starts: np.ndarray, chosen: np.ndarray) -> list[int]:
    """The levels that the variables stand for."""
    return with_tied(items, [int(chosen[starts[i] : starts[i + 1]].sum()) for i in range(len(items))])


def _variables(items: Sequence[Item], levels: Sequence[int]) -> np.ndarray:
    """The variables that stand for the levels."""
    own = [[int(step < level) for step in range(item.num_variables)] for item, level in zip(items, levels, strict=True)]
    return np.array([variable for item in own for variable in item])


def _most_saved(items: Sequence[Item], moment: Moment) -> int:
    return sum(count * max(0, *items[index].savings) for index, count in moment.alive)


def _enough(row: Mapping[int, int], needed_bytes: int, width: int) -> LinearConstraint:
    """At least so much is saved; in units of it, as HiGHS has absolute tolerances."""
    unit = needed_bytes if needed_bytes > 0 else max(map(abs, row.values()))
    savings = [(column, saving / unit) for column, saving in row.items()]
    return LinearConstraint(_matrix([savings], width), needed_bytes / unit, np.inf)


def _another(row: Mapping[int, int], chosen: np.ndarray) -> LinearConstraint:
    """At least one variable is changed so that more is saved."""
    changes = [
        (column, 1.0 if saving > 0 else -1.0)
        for column, saving in row.items()
        if saving and bool(chosen[column]) == (saving < 0)
    ]
    least = 1 - sum(sign < 0 for _, sign in changes)
    return LinearConstraint(_matrix([changes], len(chosen)), least, np.inf)


def _order_constraints(items: Sequence[Item], starts: np.ndarray) -> list[LinearConstraint]:
    """The order of levels and of the items of a group; and either an item or what covers it."""
    constraints = []
    order = _order_rows(items, starts)
    if order:
        constraints.append(LinearConstraint(_matrix(order, int(starts[-1])), 0, np.inf))
    either = [
        [(int(starts[index]), 1.0), (int(starts[item.covered_by]), 1.0)]
        for index, item in enumerate(items)
        if item.covered_by is not None
    ]
    if either:
        constraints.append(LinearConstraint(_matrix(either, int(starts[-1])), -np.inf, 1))
    for index, item in enumerate(items):
        if len(item.tied_to) > 1:
            constraints.append(_at_least_all(item, index, starts))
    return constraints


def _at_least_all(item: Item, index: int, starts: np.ndarray) -> LinearConstraint:
    """Each level of an item that is tied to several is reached where all of them are there."""
    first, *others = (int(starts[master]) for master in item.tied_to)
    rows = [
        [(int(starts[index]) + level, 1.0), (first + level, -1.0), *((other, -1.0) for other in others)]
        for level in range(item.num_variables)
    ]
    return LinearConstraint(_matrix(rows, int(starts[-1])), -len(others), np.inf)


def _solve(items: Sequence[Item], constraints: Sequence[LinearConstraint], seconds: float) -> np.ndarray | None:
    costs = np.concatenate(
        [np.diff([0.0, *item.costs]) if item.costs else np.zeros(item.num_variables) for item in items]
    )
    result = milp(
        costs / costs.max(),
        integrality=np.ones(len(costs), dtype=int),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": RELATIVE_GAP, "time_limit": max(seconds, 1.0)},
    )
    return None if result.x is None else np.round(result.x).astype(int)


def _saving_row(items: Sequence[Item], moment: Moment, starts: np.ndarray) -> dict[int, int]:
    """What each variable saves at a moment, by its column."""
    row: dict[int, int] = {}
    for index, count in moment.alive:
        previous, tied_to = 0, items[index].tied_to
        first = int(starts[tied_to[0] if len(tied_to) == 1 else index])
        for level, saving in enumerate(items[index].savings):
            row[first + level] = row.get(first + level, 0) + count * (saving - previous)
            previous = saving
    return row


def _order_rows(items: Sequence[Item], starts: np.ndarray) -> list[list[tuple[int, float]]]:
    """Rows that are at least 0: the levels of one item are reached in order, and along a group in the items' order."""
    rows: list[list[tuple[int, float]]] = []
    last: dict[Hashable, int] = {}
    for index, item in enumerate(items):
        first, levels = int(starts[index]), range(item.num_variables)
        rows += [[(first + level, 1.0), (first + level + 1, -1.0)] for level in levels[:-1]]
        before = last.get(item.group)
        if before is not None:
            cover = items[before].covered_by
            freed = [] if cover is None else [(int(starts[cover]), 1.0)]
            rows += [[(int(starts[before]) + level, 1.0), *freed, (first + level, -1.0)] for level in levels]
        last[item.group] = index
    return rows


def _matrix(rows: Sequence[Sequence[tuple[int, float]]], width: int) -> csr_array:
    """The sparse matrix whose rows are given as (column, entry) pairs."""
    entries = [(index, *entry) for index, row in enumerate(rows) for entry in row]
    indices, columns, data = zip(*entries, strict=True) if entries else ((), (), ())
    return csr_array((data, (indices, columns)), shape=(len(rows), width))


def _undominated(items: Sequence[Item], moments: Sequence[Moment]) -> list[Moment]:
    """Drops each moment that is lower than one at which no more items are alive, but for items that add to it."""
    kept: list[Moment] = []
    for moment in sorted(moments, key=lambda m: (-m.peak_bytes, len(m.alive))):
        alive = set(moment.alive)
        if not any(
            alive.issuperset(other.alive)
            and not any(min(items[i].savings) < 0 for i, _ in alive.difference(other.alive))
            for other in kept
        ):
            kept.append(moment)
    return kept
