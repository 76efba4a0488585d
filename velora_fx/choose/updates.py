"""What a weight's update takes: its gradient and the optimizer's state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from velora_fx.analyse import Candidate, Findings, weight_names
from velora_fx.choose.items import Item
from velora_fx.simulate import Timeline


@dataclass
class Update:
    """The storages of a parameter, of its gradient and of its optimizer state, with their bytes."""

    parameter_bytes: int = 0
    gradient: dict[int, int] = field(default_factory=dict)
    state: dict[int, int] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """The bytes of gradient and state."""
        return sum(self.gradient.values()) + sum(self.state.values())


def updates_of(timeline: Timeline) -> Mapping[str, Update]:
    """The update of each parameter of a step by its dotted name."""
    found: dict[str, Update] = {}
    for storage, category in timeline.categories.items():
        if category not in ("parameters", "gradients", "optimizer"):
            continue
        where, num_bytes = timeline.labels[storage].where, int(timeline.deltas[timeline.births[storage]])
        if category == "parameters":
            found.setdefault(where, Update()).parameter_bytes = num_bytes
            continue
        own = found.setdefault(where.partition(" of ")[2], Update())
        (own.gradient if category == "gradients" else own.state)[storage] = num_bytes
    return found


@dataclass(frozen=True)
class Freed:
    """What factored gradients free with a candidate: an item tied to it, and the events from and up to which it is."""

    item: Item
    first: int
    end: int


def find_freed(
    findings: Findings, candidates: Sequence[Candidate], sizes: Sequence[Sequence[int]]
) -> tuple[Freed, ...]:
    """The optimizer state of all weights of each candidate, less their carriers, and the gradient of each of them and
    what the optimizer makes of it.

    `sizes` gives the sub-token sizes that each candidate may take.
    """
    timeline = findings.timeline
    assert timeline is not None
    found, updates, end = [], updates_of(timeline), len(timeline.deltas)
    scratch = _scratch_of(timeline, updates)
    for index, candidate in enumerate(candidates):
        names = weight_names(candidate.savings, findings)
        own = [updates[name] for name in names]
        state_bytes = sum(sum(update.state.values()) for update in own)
        carrier_bytes = sum(update.parameter_bytes for update in own)
        found.append(Freed(_tied(index, sizes[index], state_bytes, carrier_bytes), 0, end))
        for update in own:
            for storage, num_bytes in update.gradient.items():
                found.append(Freed(_tied(index, sizes[index], num_bytes, 0), timeline.births[storage], end))
        for storage in (storage for name in names for storage in scratch.get(name, ())):
            birth, death = timeline.births[storage], timeline.deaths.get(storage, end)
            found.append(Freed(_tied(index, sizes[index], int(timeline.deltas[birth]), 0), birth, death))
    return tuple(found)


def _scratch_of(timeline: Timeline, updates: Mapping[str, Update]) -> Mapping[str, list[int]]:
    """The temporary tensors of the size of each weight in the optimizer step, which makes them in the order of weights.

    An optimizer that works on lists makes the first of each weight, then the second of each; another all of a weight.
    """
    start = timeline.start_of("optimizer step")
    weights: dict[int, list[str]] = {}
    for name, update in updates.items():
        if update.gradient:
            weights.setdefault(update.parameter_bytes, []).append(name)
    made: dict[int, list[int]] = {}
    for storage, birth in sorted(timeline.births.items(), key=lambda item: item[1]):
        if birth >= start and timeline.category(storage) == "temporary":
            made.setdefault(int(timeline.deltas[birth]), []).append(storage)
    found: dict[str, list[int]] = {}
    for num_bytes, storages in made.items():
        names = weights.get(num_bytes, [])
        if not names or len(storages) % len(names):
            continue
        last_of_first = timeline.births[storages[len(names) - 1]]
        works_on_lists = timeline.deaths.get(storages[0], last_of_first) > last_of_first
        for number, storage in enumerate(storages):
            place = number % len(names) if works_on_lists else number * len(names) // len(storages)
            found.setdefault(names[place], []).append(storage)
    return found


def _tied(index: int, sizes: Sequence[int], num_bytes: int, carrier_bytes: int) -> Item:
    """Frees all but one part in M of the bytes, and takes that part of the carrier's."""
    savings = tuple(num_bytes - (num_bytes + carrier_bytes) // size for size in sizes)
    return Item(group=("tied", index), savings=savings, costs=(), tied_to=(index,))
