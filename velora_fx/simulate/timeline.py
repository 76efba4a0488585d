"""Memory over one training step, as plain numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from velora_fx.names import LAYER, collapse
from velora_fx.peaks import Curve, Group, Peak

CATEGORIES = ("parameters", "buffers", "gradients", "optimizer", "activations", "temporary")
POINTS = 400
NUM_LARGEST = 5


class Label(NamedTuple):
    """What a storage is: where it was made or its name, and, if an operator made it, by which and as what tensor.

    "lm_head: linear [4, 2048, 32000] float32", "backward of lm_head: mm [8192, 4096] float32", "gradient of fc.weight".
    """

    where: str
    operator: str = ""
    tensor: str = ""

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.where, f"{self.operator} {self.tensor}".strip())))


class Place(NamedTuple):
    """A stretch of the step in one module: its first event, its name, and the module."""

    event: int
    name: str
    scope: str


@dataclass(frozen=True)
class Returned:
    """What the model returned: the first event after that, the storages of its output, and, where its loss is not known
    but a stand-in, the bytes of that output in float32."""

    event: int = 0
    storages: tuple[int, ...] = ()
    float32_bytes: int = 0


NOTHING = Returned()


@dataclass(frozen=True)
class Timeline:
    """Births and deaths of storages in time order.

    `storages[i]` is born by the first event i that names it, with `deltas[i]` bytes, and freed by the second.
    `categories` gives each storage's category, `labels` what it is in words; `marks` the first event of each moment of
    the step, `places` that of each stretch in one module, in order. `seconds` is the
    predicted time of the step, `returned` what the model returned in it.
    """

    storages: NDArray[np.int64]
    deltas: NDArray[np.int64]
    categories: Mapping[int, str]
    marks: tuple[tuple[int, str], ...]
    labels: tuple[Label, ...] = ()
    places: tuple[Place, ...] = ()
    seconds: float = 0.0
    returned: Returned = NOTHING

    @cached_property
    def live_bytes(self) -> NDArray[np.int64]:
        """Bytes in use after each event."""
        return np.cumsum(self.deltas)

    @cached_property
    def births(self) -> dict[int, int]:
        """The event at which each storage is born: the first that names it."""
        storages, events = np.unique(self.storages, return_index=True)
        return dict(zip(storages.tolist(), events.tolist(), strict=True))

    @cached_property
    def deaths(self) -> dict[int, int]:
        """The event at which each storage is freed, the last that names it; those that outlive the step are missing."""
        storages, events = np.unique(self.storages[::-1], return_index=True)
        last = zip(storages.tolist(), (len(self.storages) - 1 - events).tolist(), strict=True)
        return {storage: event for storage, event in last if event != self.births[storage]}

    @cached_property
    def peak(self) -> Peak:
        """The highest point of the step."""
        event = int(np.argmax(self.live_bytes))
        live = self.live(event)
        breakdown = dict.fromkeys(CATEGORIES, 0)
        for storage, size in live.items():
            breakdown[self.category(storage)] += size
        moment = [name for start, name in self.marks if start <= event][-1]
        peak = Peak(int(self.live_bytes[event]), breakdown, moment, self.curve, self.seconds, moment, timeline=self)
        if not self.labels:
            return peak
        others = {s: size for s, size in live.items() if self.category(s) not in ("parameters", "buffers")}
        place = [place for place in self.places if place.event <= event][-1]
        there = (place.scope, f"backward of {place.scope}")
        own = [(self._kind(s, True), size) for s, size in others.items() if self.labels[s].where in there]
        largest = _groups((self._kind(s), size) for s, size in others.items())[:NUM_LARGEST]
        return replace(peak, place=place.name, there=next(iter(_groups(own)), None), largest=largest)

    @cached_property
    def peak_bytes_with_output(self) -> int:
        """The highest point where the caller keeps the output, as a loop with `out = model(batch)` does: over backward
        and the optimizer step, and through the next forward until that returns."""
        more = np.zeros_like(self.deltas)
        for storage in self.returned.storages:
            if storage in self.deaths:
                more[self.deaths[storage] :] += self.deltas[self.births[storage]]
                more[: self.returned.event] += self.deltas[self.births[storage]]
        return int(np.max(self.live_bytes + more))

    def _kind(self, storage: int, is_place_known: bool = False) -> str:
        """What a storage has in common with others; what there is for each parameter counts as one, of any shape."""
        where, operator, tensor = self.labels[storage]
        if self.category(storage) in ("gradients", "optimizer"):
            return f"{where.partition(' of ')[0]} of parameters"
        if where == "optimizer step":
            return operator if is_place_known else f"{where}: {operator}"
        return tensor if is_place_known else str(self.labels[storage])

    def live(self, event: int) -> dict[int, int]:
        """The storages in use after an event, with their bytes."""
        found: dict[int, int] = {}
        for storage, delta in zip(self.storages[: event + 1].tolist(), self.deltas[: event + 1].tolist(), strict=True):
            if found.pop(storage, None) is None:
                found[storage] = delta
        return found

    def category(self, storage: int) -> str:
        """The category of a storage, "temporary" for one that was given none."""
        return self.categories.get(storage, "temporary")

    def start_of(self, moment: str) -> int:
        """The first event of a moment."""
        return next(start for start, name in self.marks if name == moment)

    def bytes_at_start_of(self, moment: str) -> int:
        """Bytes in use when a moment begins."""
        return int(self.live_bytes[self.start_of(moment) - 1])

    @property
    def saved_bytes(self) -> int:
        """Bytes of the step's own tensors in use when backward begins."""
        live = self.live(self.start_of("backward") - 1)
        return sum(size for s, size in live.items() if self.category(s) in ("activations", "temporary"))

    @cached_property
    def curve(self) -> Curve:
        """The step, from its first moment on, at the highest event in each of POINTS stretches of events."""
        first = min(self.marks[0][0], len(self.deltas) - 1)
        starts = np.unique(np.linspace(first, len(self.deltas), POINTS, endpoint=False).astype(int))
        stretches = zip(starts, [*starts[1:], len(self.deltas)], strict=True)
        shown = [int(start + np.argmax(self.live_bytes[start:end])) for start, end in stretches]
        own = np.array([CATEGORIES.index(self.category(s)) for s in self.storages.tolist()])
        categories = {
            name: tuple(np.cumsum(np.where(own == index, self.deltas, 0))[shown].tolist())
            for index, name in enumerate(CATEGORIES)
        }
        moments = tuple((int(np.searchsorted(starts, start)), name) for start, name in self.marks)
        return Curve(categories, moments)


def _groups(labelled: Iterable[tuple[str, int]]) -> tuple[Group, ...]:
    """Labels with bytes, those that differ only in the numbers of layers together, the largest first."""
    found: dict[tuple[str, ...], list[tuple[str, int]]] = {}
    for label, size in labelled:
        found.setdefault(tuple(LAYER.split(label)), []).append((label, size))
    groups = [
        Group(
            ", ".join(text for text, _ in collapse(label for label, _ in same)),
            len(same),
            sum(size for _, size in same),
        )
        for same in found.values()
    ]
    return tuple(sorted(groups, key=lambda group: -group.num_bytes))
