"""What can be done about a step's memory, item by item: what its levels free at which moment, and what they cost."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """Something that can be compressed: `savings[l]` bytes at `costs[l]` for level l + 1, both growing with l.

    Level 0 keeps it whole. Items of one `group` are alike, the one that lives longest first: a later one is never
    compressed more than an earlier one, so that plans are regular. Where the item with index `covered_by` is above
    level 0 it frees this one too: this one then stays at level 0, and counts as compressed in the order of its group.
    An item with `tied_to` has no level and no costs of its own: its level is that of the first item there, and 0 while
    another one there is at level 0. It may save less than nothing; one that is tied to several never saves anything.
    """

    group: Hashable
    savings: tuple[int, ...]
    costs: tuple[float, ...]
    covered_by: int | None = None
    tied_to: tuple[int, ...] = ()

    @property
    def num_variables(self) -> int:
        """How many variables of the program are the item's own; one that is tied to one other shares all of its."""
        return len(self.costs) if len(self.tied_to) < 2 else len(self.savings)


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


def highest_levels(items: Sequence[Item]) -> list[int]:
    """Everything compressed as far as it goes; of an item and those that it covers, whatever frees more."""
    covered = [0] * len(items)
    for item in items:
        if item.covered_by is not None:
            covered[item.covered_by] += item.savings[-1]
    own = [index for index, item in enumerate(items) if not item.tied_to]
    kept = {index for index in own if covered[index] > items[index].savings[-1]}
    levels = []
    for index, item in enumerate(items):
        is_covered = item.covered_by is not None and item.covered_by not in kept
        levels.append(0 if index in kept or is_covered else len(item.savings))
    return with_tied(items, levels)


def with_tied(items: Sequence[Item], levels: Sequence[int]) -> list[int]:
    """The levels with those of tied items as their masters have it."""
    return [_level_of(item, levels, own) for item, own in zip(items, levels, strict=True)]


def _level_of(item: Item, levels: Sequence[int], own: int) -> int:
    if not item.tied_to:
        return own
    first, *others = item.tied_to
    return levels[first] if all(levels[other] for other in others) else 0


def trimmed(items: Sequence[Item], moments: Sequence[Moment], budget_bytes: int, levels: list[int]) -> tuple[int, ...]:
    """Lowers every level that the budget does not need: the solver stops within a relative gap of the optimum.

    What covers others stays above level 0.
    """
    covers = {item.covered_by for item in items}
    depending: dict[int, set[int]] = {index: {index} for index, item in enumerate(items) if not item.tied_to}
    for index, item in enumerate(items):
        for master in item.tied_to:
            depending[master].add(index)
    counts = [dict(moment.alive) for moment in moments]
    slack = [budget_bytes - moment.bytes_at(items, levels) for moment in moments]
    following: dict[Hashable, int] = {}
    for index in reversed(list(depending)):
        item = items[index]
        floor = max(following.get(item.group, 0), min(1, levels[index]) if index in covers else 0)
        while levels[index] > floor:
            lowered = [*levels[:index], levels[index] - 1, *levels[index + 1 :]]
            after = {i: _level_of(items[i], lowered, lowered[i]) for i in depending[index]}
            growth = {i: _saved(items[i], levels[i]) - _saved(items[i], level) for i, level in after.items()}
            extra = [sum(count.get(i, 0) * more for i, more in growth.items()) for count in counts]
            if any(more > free for more, free in zip(extra, slack, strict=True)):
                break
            slack = [free - more for more, free in zip(extra, slack, strict=True)]
            for i, level in after.items():
                levels[i] = level
        following[item.group] = levels[index]
    return tuple(levels)


def _saved(item: Item, level: int) -> int:
    return item.savings[level - 1] if level else 0
