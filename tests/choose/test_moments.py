"""The moments of a step against the step event by event."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from velora_fx.choose.items import Item
from velora_fx.choose.problem import find_moments
from velora_fx.simulate import Timeline


@st.composite
def steps(draw: st.DrawFn) -> tuple[Timeline, list[tuple[int, int, int]]]:
    """A step of up to eight storages, and spans of up to three items in it."""
    alive: dict[int, int] = {}
    storages, deltas = [], []
    for _ in range(draw(st.integers(2, 14))):
        if alive and draw(st.booleans()):
            storage = draw(st.sampled_from(sorted(alive)))
            storages.append(storage)
            deltas.append(-alive.pop(storage))
        else:
            storages.append(len(set(storages)))
            deltas.append(draw(st.integers(10, 99)))
            alive[storages[-1]] = deltas[-1]
    spans = []
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(deltas)))
        spans.append((start, draw(st.integers(start, len(deltas))), draw(st.integers(0, 2))))
    return Timeline(np.array(storages), np.array(deltas), {}, ((0, "forward"),)), spans


@settings(max_examples=200, deadline=None, derandomize=True)
@given(steps(), st.lists(st.integers(0, 1), min_size=3, max_size=3))
def test_the_highest_moment_is_the_highest_event_for_any_choice_of_items(
    step: tuple[Timeline, list[tuple[int, int, int]]], levels: list[int]
) -> None:
    timeline, spans = step
    items = [Item("", (saving,), (1.0,)) for saving in (1, 2, 5)]
    live, expected = 0, []
    for event, delta in enumerate(timeline.deltas.tolist()):
        live += delta
        freed = sum(items[i].savings[0] for start, stop, i in spans if levels[i] and start <= event < stop)
        expected.append(live - freed)
    moments = find_moments(timeline, spans)
    assert max(moment.bytes_at(items, levels) for moment in moments) == max(expected)
