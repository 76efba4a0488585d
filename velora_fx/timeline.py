"""Memory over one training step, as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

CATEGORIES = ("parameters", "buffers", "gradients", "optimizer", "activations", "temporary")


@dataclass(frozen=True)
class Peak:
    """The highest point of a step: its bytes, the bytes of each category then, and the moment ("backward", ...)."""

    peak_bytes: int
    breakdown: Mapping[str, int]
    moment: str


@dataclass(frozen=True)
class Timeline:
    """Births and deaths of storages in time order.

    `storages[i]` is born (`deltas[i]` > 0, bytes) or freed (< 0) by event i. `categories` gives each storage's
    category; `marks` the first event of each moment of the step, in order.
    """

    storages: NDArray[np.int64]
    deltas: NDArray[np.int64]
    categories: Mapping[int, str]
    marks: tuple[tuple[int, str], ...]

    @cached_property
    def live_bytes(self) -> NDArray[np.int64]:
        """Bytes in use after each event."""
        return np.cumsum(self.deltas)

    @cached_property
    def births(self) -> dict[int, int]:
        """The event at which each storage is born."""
        return {int(self.storages[i]): int(i) for i in np.flatnonzero(self.deltas > 0)}

    @cached_property
    def deaths(self) -> dict[int, int]:
        """The event at which each storage is freed; storages that outlive the step are missing."""
        return {int(self.storages[i]): int(i) for i in np.flatnonzero(self.deltas < 0)}

    @cached_property
    def peak(self) -> Peak:
        """The highest point of the step."""
        event = int(np.argmax(self.live_bytes))
        breakdown = dict.fromkeys(CATEGORIES, 0)
        for storage, delta in zip(self.storages[: event + 1].tolist(), self.deltas[: event + 1].tolist(), strict=True):
            breakdown[self.categories.get(storage, "temporary")] += delta
        moment = [name for start, name in self.marks if start <= event][-1]
        return Peak(int(self.live_bytes[event]), breakdown, moment)
