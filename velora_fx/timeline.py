"""Memory over one training step, as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

CATEGORIES = ("parameters", "buffers", "gradients", "optimizer", "activations", "temporary")
POINTS = 400


@dataclass(frozen=True)
class Curve:
    """Memory over a step at a few hundred points: the bytes of each category, and the first point of each moment."""

    categories: Mapping[str, tuple[int, ...]]
    moments: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Peak:
    """The highest point of a step: its bytes, the bytes of each category then, and the moment ("backward", ...).

    `curve` is the way there and on, `step_seconds` the predicted time of the whole step.
    """

    peak_bytes: int
    breakdown: Mapping[str, int]
    moment: str
    curve: Curve | None = None
    step_seconds: float = 0.0


@dataclass(frozen=True)
class Timeline:
    """Births and deaths of storages in time order.

    `storages[i]` is born by the first event i that names it, with `deltas[i]` bytes, and freed by the second.
    `categories` gives each storage's category; `marks` the first event of each moment of the step, in order;
    `seconds` the predicted time of the step.
    """

    storages: NDArray[np.int64]
    deltas: NDArray[np.int64]
    categories: Mapping[int, str]
    marks: tuple[tuple[int, str], ...]
    seconds: float = 0.0

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
        breakdown = dict.fromkeys(CATEGORIES, 0)
        for storage, delta in zip(self.storages[: event + 1].tolist(), self.deltas[: event + 1].tolist(), strict=True):
            breakdown[self.categories.get(storage, "temporary")] += delta
        moment = [name for start, name in self.marks if start <= event][-1]
        return Peak(int(self.live_bytes[event]), breakdown, moment, self.curve, self.seconds)

    def bytes_at_start_of(self, moment: str) -> int:
        """Bytes in use when a moment begins."""
        start = next(start for start, name in self.marks if name == moment)
        return int(self.live_bytes[start - 1])

    @cached_property
    def curve(self) -> Curve:
        """The step, from its first moment on, at the highest event in each of POINTS stretches of events."""
        first = min(self.marks[0][0], len(self.deltas) - 1)
        starts = np.unique(np.linspace(first, len(self.deltas), POINTS, endpoint=False).astype(int))
        stretches = zip(starts, [*starts[1:], len(self.deltas)], strict=True)
        shown = [int(start + np.argmax(self.live_bytes[start:end])) for start, end in stretches]
        own = np.array([CATEGORIES.index(self.categories.get(s, "temporary")) for s in self.storages.tolist()])
        categories = {
            name: tuple(np.cumsum(np.where(own == index, self.deltas, 0))[shown].tolist())
            for index, name in enumerate(CATEGORIES)
        }
        moments = tuple((int(np.searchsorted(starts, start)), name) for start, name in self.marks)
        return Curve(categories, moments)
