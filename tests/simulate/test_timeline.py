"""Births, deaths, live bytes and the peak of a timeline equal a brute-force replay of its events."""

from __future__ import annotations

import copy
import pickle
import re
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import strategies as st

from tests.helpers.examples import for_any
from velora_fx.peaks import Group
from velora_fx.simulate import Timeline
from velora_fx.simulate.timeline import CATEGORIES, Label, Place


@dataclass(frozen=True)
class History:
    """Events as (storage, delta), with categories and marks, as a tracker writes them."""

    events: list[tuple[int, int]]
    categories: dict[int, str]
    marks: list[tuple[int, str]]
    labels: list[Label]
    places: list[Place]

    @property
    def timeline(self) -> Timeline:
        storages, deltas = zip(*self.events, strict=True)
        return Timeline(
            np.array(storages), np.array(deltas), self.categories, tuple(self.marks), tuple(self.labels),
            tuple(self.places),
        )  # fmt: skip


OF_PARAMETERS = ("gradients", "optimizer")
scopes = st.sampled_from(["head", "h.0.fc", "h.1.fc", "h.2.fc", "backward of h.1.fc"])
tensors = st.sampled_from(["[4, 8] float32", "[8] float32"])


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
    starts = st.lists(st.integers(0, len(events) - 1), max_size=3).map(lambda drawn: sorted({0, *drawn}))
    marks = [(start, f"moment {number}") for number, start in enumerate(draw(starts))]
    places = [Place(start, f"place {start}", draw(scopes)) for start in draw(starts)]
    labels = [
        Label(f"{draw(st.sampled_from(['gradient', 'exp_avg']))} of h.{draw(st.integers(0, 2))}.fc.weight")
        if categories.get(storage) in OF_PARAMETERS
        else Label(draw(scopes), draw(st.sampled_from(["mm", "add"])), draw(tensors))
        for storage in range(len(sizes))
    ]
    return History(events, categories, marks, labels, places)


for_any_history = for_any(histories(), examples=200)


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


@for_any_history
def test_live_bytes_are_those_of_the_storages_in_use(history):
    assert history.timeline.live_bytes.tolist() == [sum(live.values()) for live in replay(history)]


@for_any_history
def test_a_storage_is_in_use_from_its_birth_to_its_death(history):
    """Storages without bytes too: an expert that gets no token saves an input of no rows."""
    births, deaths = history.timeline.births, history.timeline.deaths
    for event, live in enumerate(replay(history)):
        in_use = {s for s in births if births[s] <= event < deaths.get(s, len(history.events))}
        assert in_use == set(live)


def at_the_peak(history: History, *but: str) -> tuple[int, dict[int, int]]:
    """The first event of the peak, and the bytes of what is in use then but for some categories."""
    states = replay(history)
    event = max(range(len(states)), key=lambda event: sum(states[event].values()))
    return event, {s: size for s, size in states[event].items() if history.categories.get(s) not in but}


@for_any_history
def test_the_peak_is_the_highest_point_and_its_breakdown_what_is_in_use_there_by_category(history):
    peak, live = history.timeline.peak, at_the_peak(history)[1]
    expected = dict.fromkeys(CATEGORIES, 0)
    for storage, size in live.items():
        expected[history.categories.get(storage, "temporary")] += size
    assert dict(peak.breakdown) == expected
    assert sum(peak.breakdown.values()) == peak.peak_bytes == sum(live.values())


@for_any_history
def test_the_moment_of_the_peak_is_the_last_one_opened_before_it(history):
    first, _ = at_the_peak(history)
    assert history.timeline.peak.moment == max(mark for mark in history.marks if mark[0] <= first)[1]


@for_any_history
def test_the_largest_groups_at_the_peak_are_a_recount_by_label_without_layer_numbers(history):
    recounted: dict[str, list[int]] = defaultdict(list)
    for storage, size in at_the_peak(history, "parameters", "buffers")[1].items():
        label = history.labels[storage]
        if history.categories.get(storage) in OF_PARAMETERS:
            recounted[f"{label.where.split()[0]} of parameters"].append(size)
        else:
            recounted[re.sub(r"h\.\d", "h.N", str(label))].append(size)
    largest = [(re.sub(r"h\.[\d,-]+", "h.N", g.label), g.count, g.num_bytes) for g in history.timeline.peak.largest]
    expected = {name: (len(sizes), sum(sizes)) for name, sizes in recounted.items()}
    assert all(expected[name] == (count, size) for name, count, size in largest)
    sizes = sorted((size for _, size in expected.values()), reverse=True)
    assert [size for _, _, size in largest] == sizes[:5]


@for_any_history
def test_the_place_of_the_peak_is_the_last_one_opened_before_it_with_the_most_of_its_tensors(history):
    event, live = at_the_peak(history, "parameters", "buffers")
    place = max(place for place in history.places if place.event <= event)
    peak = history.timeline.peak
    assert peak.place == place.name
    totals: dict[str, int] = defaultdict(int)
    for storage, size in live.items():
        if history.labels[storage].where in (place.scope, f"backward of {place.scope}"):
            totals[history.labels[storage].tensor] += size
    assert (peak.there is None) == (not totals)
    if peak.there is not None:
        assert totals[peak.there.label] == peak.there.num_bytes == max(totals.values())


@for_any_history
def test_the_curve_is_the_way_to_the_peak(history):
    """Its highest point is the peak, with the peak's breakdown, wherever the stretches are cut."""
    peak = history.timeline.peak
    assert peak.curve is not None
    totals = [sum(values) for values in zip(*peak.curve.categories.values(), strict=True)]
    assert max(totals) == peak.peak_bytes
    at = totals.index(max(totals))
    assert {name: values[at] for name, values in peak.curve.categories.items()} == dict(peak.breakdown)


@for_any_history
def test_a_storage_is_born_before_it_dies_and_only_once(history):
    timeline = history.timeline
    assert sorted(timeline.births) == sorted({storage for storage, _ in history.events})
    assert all(timeline.births[storage] < death for storage, death in timeline.deaths.items())
    assert len(set(timeline.births.values()) | set(timeline.deaths.values())) == len(history.events)


def test_what_there_is_for_each_parameter_is_one_group_of_any_shape():
    names = [f"{kind} of h.{layer}.{leaf}" for kind in ("gradient", "exp_avg") for layer in (0, 1) for leaf in "ab"]
    step = [Label("optimizer step", "foreach_sqrt", shape) for shape in ("[8] float32", "[9] float32")]
    timeline = Timeline(
        np.arange(10), np.arange(1, 11), {n: ("gradients", "optimizer")[n // 4] for n in range(8)},
        ((0, "optimizer step"),), (*map(Label, names), *step), (Place(0, "optimizer step", "optimizer step"),),
    )  # fmt: skip
    assert timeline.peak.largest == (
        Group("exp_avg of parameters", 4, 5 + 6 + 7 + 8),
        Group("optimizer step: foreach_sqrt", 2, 9 + 10),
        Group("gradient of parameters", 4, 1 + 2 + 3 + 4),
    )
    assert timeline.peak.there == Group("foreach_sqrt", 2, 9 + 10)


def test_layers_that_hold_the_same_are_one_group():
    labels = tuple(Label(f"h.{layer}.fc", "linear", "[4, 8] float32") for layer in (0, 1, 3))
    places = (Place(0, "forward of h.3.fc", "h.3.fc"),)
    timeline = Timeline(np.arange(3), np.array([7] * 3), {}, ((0, "forward"),), labels, places)
    assert timeline.peak.largest == (Group("h.0-1,3.fc: linear [4, 8] float32", 3, 21),)
    assert timeline.peak.there == Group("[4, 8] float32", 1, 7)


def test_copies_and_pickles_of_a_peak_leave_the_events_behind():
    peak = Timeline(np.arange(2), np.array([1, 2]), {}, ((0, "forward"),)).peak
    assert peak.timeline is not None
    for copied in (copy.deepcopy(peak), pickle.loads(pickle.dumps(peak))):
        assert copied == peak and copied.timeline is None


def test_terabytes_are_counted_to_the_byte():
    timeline = Timeline(np.arange(5), np.array([2**40 + 1] * 5), {}, ((0, "forward"),))
    assert timeline.peak.peak_bytes == 5 * (2**40 + 1)


def test_plain_numbers_come_out():
    """The plan is written as JSON."""
    marks = ((0, "forward"), (1, "backward"))
    timeline = Timeline(np.array([0, 1, 0]), np.array([4, 8, -4]), {0: "activations"}, marks)
    peak = timeline.peak
    numbers = [peak.peak_bytes, *peak.breakdown.values(), *timeline.births.values(), *timeline.deaths.values()]
    assert {type(number) for number in [*numbers, *timeline.births, *timeline.deaths]} == {int}
    assert (peak.peak_bytes, peak.moment) == (12, "backward")


@pytest.mark.parametrize("size", [0, 7])
def test_a_storage_that_outlives_the_step_has_no_death(size):
    timeline = Timeline(np.array([0]), np.array([size]), {}, ((0, "forward"),))
    assert (timeline.births, timeline.deaths) == ({0: 0}, {})
