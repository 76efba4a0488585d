"""The moments of a step that a plan has to fit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from velora_fx.choose.items import Moment
from velora_fx.simulate import Timeline

Span = tuple[int, int, int]  # first event, event after the last, index of an item


def find_moments(timeline: Timeline, spans: Sequence[Span]) -> tuple[Moment, ...]:
    """Cuts a step where the set of items alive changes, and takes each stretch's peak.

    A span says when a storage that an item would free is alive; an item may have several.
    """
    end = len(timeline.deltas)
    cuts = sorted({0, *(min(start, end - 1) for start, _, _ in spans), *(stop for _, stop, _ in spans if stop < end)})
    peaks = np.maximum.reduceat(timeline.live_bytes, cuts)
    moments = []
    for cut, highest in zip(cuts, peaks.tolist(), strict=True):
        alive: dict[int, int] = {}
        for start, stop, index in spans:
            if start <= cut < stop:
                alive[index] = alive.get(index, 0) + 1
        moments.append(Moment(int(highest), tuple(sorted(alive.items()))))
    return tuple(moments)
