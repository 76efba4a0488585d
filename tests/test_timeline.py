"""Births, deaths, live bytes and the peak of a timeline equal a brute-force replay of its events."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from velora_fx.timeline import CATEGORIES, Timeline

few = settings(max_examples=200, deadline=None, derandomize=True)


@dataclass(frozen=True)
class History:
    """Events as (storage, delta), with categories and marks, as a tracker writes them."""

    events: list[tuple[int, int]]
    categories: dict[int, str]
    marks: list[tuple[int, str]]

    @property
    def timeline(self) -> Timeline:
        storages, deltas = zip(*self.events, strict=True)
        return Timeline(np.array(storages), np.array(deltas), self.categories, tuple(self.marks))


@st.composite
def histories(draw: st.DrawFn) -> History:
    """Storages of any size, zero too, born in the order of their numbers; each may be freed later."""
    sizes = draw(st.lists(st.integers(0, 50), min_size=1, max_size=12))
    events: list[tuple[int, int]] = []
    live: list[int] = []
    for storage, size in enumerate(sizes):
        for _ in range(draw(st.integers(0, 2))):
            if live:
                freed = live.pop(draw(st.integers(0, len(live) - 1)))
                events.append((freed, -sizes[freed]))
        events.append((storage, size))
        live.append(storage)
    categories = draw(st.dictionaries(st.sampled_from(range(len(sizes))), st.sampled_from(CATEGORIES)))
    starts = sorted({0, *draw(st.lists(st.integers(0, len(events) - 1), max_size=3))})
    return History(events, categories, [(start, f"moment {number}") for number, start in enumerate(starts)])


def replay(history: History) -> list[dict[int, int]]:
    """The live storages and their bytes after each event."""
    live: dict[int, int] = {}
    states = []
    for storage, delta in history.events:
        if storage in live:
            del live[storage]
        else:
            live[storage] = delta
        states.append(dict(live))
    return states


@few
@given(histories())
def test_live_bytes_are_those_of_the_storages_in_use(history):
    assert history.timeline.live_bytes.tolist() == [sum(live.values()) for live in replay(history)]


@few
@given(histories())
def test_a_storage_is_in_use_from_its_birth_to_its_death(history):
    """Storages without bytes too: an expert that gets no token saves an input of no rows."""
    births, deaths = history.timeline.births, history.timeline.deaths
    for event, live in enumerate(replay(history)):
        in_use = {s for s in births if births[s] <= event < deaths.get(s, len(history.events))}
        assert in_use == set(live)


@few
@given(histories())
def test_the_peak_is_the_highest_point(history):
    peak = history.timeline.peak
    states = replay(history)
    assert peak.peak_bytes == max(sum(live.values()) for live in states)


@few
@given(histories())
def test_the_breakdown_is_what_is_in_use_at_the_peak_by_category(history):
    peak = history.timeline.peak
    live = next(live for live in replay(history) if sum(live.values()) == peak.peak_bytes)
    expected = dict.fromkeys(CATEGORIES, 0)
    for storage, size in live.items():
        expected[history.categories.get(storage, "temporary")] += size
    assert dict(peak.breakdown) == expected
    assert sum(peak.breakdown.values()) == peak.peak_bytes


@few
@given(histories())
def test_the_moment_of_the_peak_is_the_last_one_opened_before_it(history):
    totals = [sum(live.values()) for live in replay(history)]
    first = totals.index(max(totals))
    opened = [(start, name) for start, name in history.marks if start <= first]
    assert history.timeline.peak.moment == max(opened)[1]


def test_terabytes_are_counted_to_the_byte():
    sizes = [2**40 + 1] * 5
    timeline = Timeline(np.arange(5), np.array(sizes), {}, ((0, "forward"),))
    assert timeline.peak.peak_bytes == 5 * (2**40 + 1)


def test_plain_numbers_come_out():
    """The plan is written as JSON."""
    timeline = Timeline(
        np.array([0, 1, 0]), np.array([4, 8, -4]), {0: "activations"}, ((0, "forward"), (1, "backward"))
    )
    peak = timeline.peak
    numbers = [peak.peak_bytes, *peak.breakdown.values(), *timeline.births.values(), *timeline.deaths.values()]
    assert {type(number) for number in [*numbers, *timeline.births, *timeline.deaths]} == {int}
    assert (peak.peak_bytes, peak.moment) == (12, "backward")


@pytest.mark.parametrize("size", [0, 7])
def test_a_storage_that_outlives_the_step_has_no_death(size):
    timeline = Timeline(np.array([0]), np.array([size]), {}, ((0, "forward"),))
    assert (timeline.births, timeline.deaths) == ({0: 0}, {})
