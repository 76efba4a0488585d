"""The solver's levels against every possible choice of levels on small instances."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from unittest import mock

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from velora_fx.choose.items import Item, Moment, highest_levels, trimmed
from velora_fx.choose.solver import Program

GAP = 1e-4  # of the optimal cost, as the solver promises; the trim afterwards only lowers it
few = settings(max_examples=150, deadline=None, derandomize=True)
Levels = tuple[int, ...]


@dataclass(frozen=True)
class Instance:
    items: tuple[Item, ...]
    moments: tuple[Moment, ...]
    budget: int

    def cost(self, levels: Levels) -> float:
        return sum(item.costs[level - 1] for item, level in zip(self.items, levels, strict=True) if level)

    def peak(self, levels: Levels) -> int:
        """The highest moment, counted storage by storage."""
        highest = 0
        for moment in self.moments:
            saved = 0
            for index, count in moment.alive:
                for _ in range(count):
                    saved += (0, *self.items[index].savings)[levels[index]]
            highest = max(highest, moment.peak_bytes - saved)
        return highest

    def in_order(self, levels: Levels) -> bool:
        """Items of one group, in the order given, are compressed less and less; covered ones count as most."""
        groups: dict[object, list[int]] = {}
        for item, level in zip(self.items, levels, strict=True):
            is_covered = item.covered_by is not None and levels[item.covered_by] > 0
            if is_covered and level:
                return False
            groups.setdefault(item.group, []).append(len(item.savings) if is_covered else level)
        return all(earlier >= later for group in groups.values() for earlier, later in itertools.pairwise(group))

    def allowed(self, levels: Levels) -> bool:
        return self.in_order(levels) and self.peak(levels) <= self.budget

    def all_allowed(self) -> Iterable[Levels]:
        choices = itertools.product(*(range(len(item.savings) + 1) for item in self.items))
        return (levels for levels in choices if self.allowed(levels))

    def solved(self) -> Levels | None:
        return Program(self.items, self.moments).levels_within(self.budget)


def growing(draw: st.DrawFn, length: int, largest: int) -> tuple[int, ...]:
    steps = draw(st.lists(st.integers(1, largest), min_size=length, max_size=length))
    return tuple(itertools.accumulate(steps))


@st.composite
def instances(draw: st.DrawFn, unit: int = 1) -> Instance:
    """Up to five items in up to three groups, up to three levels, up to five moments; bytes are multiples of `unit`,
    give or take one."""
    kinds = []
    for group in range(draw(st.integers(1, 3))):
        length = draw(st.integers(1, 3))
        savings = tuple(
            unit * saving + (draw(st.integers(-1, 1)) if unit > 1 else 0) for saving in growing(draw, length, 20)
        )
        kinds.append(Item(f"group {group}", savings, tuple(map(float, growing(draw, length, 30)))))
    items = tuple(draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=5)))
    indices = st.lists(st.integers(0, len(items) - 1), unique=True)
    moments = []
    for _ in range(draw(st.integers(1, 5))):
        alive = tuple((index, draw(st.integers(1, 2))) for index in sorted(draw(indices)))
        most = sum(count * items[index].savings[-1] for index, count in alive)
        moments.append(Moment(most + unit * draw(st.integers(0, 40)), alive))
    highest = max(moment.peak_bytes for moment in moments)
    least = max(moment.bytes_at(items, [len(item.savings) for item in items]) for moment in moments)
    budget = least + (highest - least) * draw(st.integers(-2, 20)) // 20
    instance = Instance(items, tuple(moments), budget)
    if draw(st.booleans()):  # a budget that some choice meets to the byte, or misses by one
        levels = tuple(draw(st.integers(0, len(item.savings))) for item in items)
        instance = Instance(items, tuple(moments), instance.peak(levels) + draw(st.integers(-1, 0)))
    return instance


@st.composite
def covered_instances(draw: st.DrawFn) -> Instance:
    """One or two items in each of two blocks, which cover them; all are alive at the first moment."""
    sizes = [growing(draw, draw(st.integers(1, 2)), 20) for _ in range(draw(st.integers(1, 2)))]
    prices = [tuple(map(float, growing(draw, len(savings), 30))) for savings in sizes]
    count = draw(st.integers(1, 2))
    items = [
        Item(f"group {kind}", savings, price, covered_by=count * len(sizes) + block)
        for kind, (savings, price) in enumerate(zip(sizes, prices, strict=True))
        for block in range(count)
    ]
    freed = growing(draw, draw(st.integers(1, 2)), 40)
    seconds = tuple(map(float, growing(draw, len(freed), 30)))
    items += [Item("blocks", freed, seconds) for _ in range(count)]
    moments = [Moment(draw(st.integers(80, 200)), tuple((index, 1) for index in range(len(items))))]
    for _ in range(draw(st.integers(0, 3))):
        alive = sorted(draw(st.lists(st.integers(0, len(items) - 1), unique=True)))
        moments.append(Moment(draw(st.integers(0, 200)), tuple((index, 1) for index in alive)))
    return Instance(tuple(items), tuple(moments), draw(st.integers(0, 200)))


@st.composite
def tied_instances(draw: st.DrawFn) -> Instance:
    """Two items, each with one or two tied to it; what a tied one frees may be less than nothing."""
    lengths = [draw(st.integers(1, 3)) for _ in range(2)]
    items = [
        Item(f"group {index}", growing(draw, length, 20), tuple(map(float, growing(draw, length, 30))))
        for index, length in enumerate(lengths)
    ]
    for index, length in enumerate(lengths):
        for _ in range(draw(st.integers(1, 2))):
            savings = tuple(saving - draw(st.integers(0, 15)) for saving in growing(draw, length, 20))
            items.append(Item(f"tied {index}", tuple(sorted(savings)), (), tied_to=(index,)))
    moments = [Moment(draw(st.integers(60, 160)), tuple((index, 1) for index in range(len(items))))]
    for _ in range(draw(st.integers(0, 3))):
        alive = sorted(draw(st.lists(st.integers(0, len(items) - 1), unique=True)))
        moments.append(Moment(draw(st.integers(0, 160)), tuple((index, 1) for index in alive)))
    return Instance(tuple(items), tuple(moments), draw(st.integers(0, 160)))


@st.composite
def twice_freed_instances(draw: st.DrawFn) -> Instance:
    """Items that each free a part of what one of two others frees: together with it they free that once."""
    lengths = [draw(st.integers(1, 3)) for _ in range(draw(st.integers(1, 3)))]
    items = [
        Item(f"group {index}", growing(draw, length, 10), tuple(map(float, growing(draw, length, 30))))
        for index, length in enumerate(lengths)
    ]
    blocks = range(len(items), len(items) + 2)
    freed = tuple(saving + 20 for saving in growing(draw, draw(st.integers(1, 2)), 20))
    items += [Item("blocks", freed, tuple(map(float, growing(draw, len(freed), 30))))] * len(blocks)
    for index in range(len(lengths)):
        twice = tuple(-saving for saving in items[index].savings)
        items.append(Item(f"twice {index}", twice, (), tied_to=(index, draw(st.sampled_from(blocks)))))
    moments = [Moment(draw(st.integers(40, 140)), tuple((index, 1) for index in range(len(items))))]
    for _ in range(draw(st.integers(0, 3))):
        alive = sorted(draw(st.lists(st.integers(0, len(items) - 1), unique=True)))
        moments.append(Moment(draw(st.integers(0, 140)), tuple((index, 1) for index in alive)))
    return Instance(tuple(items), tuple(moments), draw(st.integers(0, 120)))


def level_of(item: Item, levels: Sequence[int]) -> int:
    return levels[item.tied_to[0]] if all(levels[master] for master in item.tied_to) else 0


@few
@given(st.one_of(tied_instances(), twice_freed_instances()))
def test_a_tied_item_is_at_the_level_of_its_master_and_no_choice_costs_less(instance):
    own = [item for item in instance.items if not item.tied_to]
    tied = instance.items[len(own) :]
    choices = itertools.product(*(range(len(item.savings) + 1) for item in own))
    complete = [(*choice, *(level_of(item, choice) for item in tied)) for choice in choices]
    costs = [
        sum(item.costs[level - 1] for item, level in zip(own, choice, strict=False) if level)
        for choice in complete
        if Instance(tuple(own), (), 0).in_order(choice[: len(own)]) and instance.peak(choice) <= instance.budget
    ]
    levels = instance.solved()
    if levels is None:
        assert not costs
        return
    assert all(level == level_of(item, levels) for item, level in zip(tied, levels[len(own) :], strict=True))
    assert instance.peak(levels) <= instance.budget
    found = sum(item.costs[level - 1] for item, level in zip(own, levels, strict=False) if level)
    assert found <= min(costs) * (1 + GAP) + 1e-9


def test_a_moment_that_compression_raises_above_the_budget_counts():
    items = (Item("a", (100, 200), (1.0, 2.0)), Item("tied", (-50, -10), (), tied_to=(0,)))
    instance = Instance(items, (Moment(180, ((0, 1),)), Moment(90, ((1, 1),))), 100)
    assert instance.solved() == (2, 2)


def test_bytes_that_are_missing_may_come_from_compressing_less():
    unit = 10**10  # so that the solver takes what is some bytes short for enough
    items = (
        Item("a", (unit + 4,), (10.0,)),
        Item("c", (100,), (1.0,)),
        Item("d", (100,), (2.0,)),
        Item("e", (10**9,), (1000.0,)),
        Item("tied", (-5,), (), tied_to=(1,)),
    )
    moments = (Moment(2 * unit, ((0, 1), (3, 1), (4, 1))), Moment(unit + 50, ((1, 1), (2, 1))))
    assert Instance(items, moments, unit).solved() == (1, 0, 1, 0, 0)


@few
@given(covered_instances())
def test_with_items_that_cover_others_no_choice_costs_less(instance):
    levels = instance.solved()
    costs = [instance.cost(allowed) for allowed in instance.all_allowed()]
    assert (levels is None) == (not costs)
    if levels is not None:
        assert instance.allowed(levels)
        assert instance.cost(levels) <= min(costs) * (1 + GAP) + 1e-9


@few
@given(instances())
def test_there_are_levels_exactly_where_some_choice_fits(instance):
    assert (instance.solved() is None) == (next(iter(instance.all_allowed()), None) is None)


@few
@given(instances())
def test_the_levels_fit_the_budget_and_keep_the_order_of_each_group(instance):
    levels = instance.solved()
    assume(levels is not None)
    assert len(levels) == len(instance.items)
    assert instance.allowed(levels)


@few
@given(instances())
def test_no_choice_costs_less(instance):
    levels = instance.solved()
    assume(levels is not None)
    cheapest = min(map(instance.cost, instance.all_allowed()))
    assert instance.cost(levels) <= cheapest * (1 + GAP) + 1e-9


@few
@given(instances())
def test_no_item_could_be_compressed_less_by_itself(instance):
    levels = instance.solved()
    assume(levels is not None)
    for index, level in enumerate(levels):
        for lower in range(level):
            assert not instance.allowed((*levels[:index], lower, *levels[index + 1 :]))


@few
@given(instances(), st.integers(0, 60))
def test_a_larger_budget_never_costs_more(instance, more):
    levels = instance.solved()
    assume(levels is not None)
    larger = Instance(instance.items, instance.moments, instance.budget + more)
    with_more = larger.solved()
    assert with_more is not None
    assert larger.cost(with_more) <= instance.cost(levels) * (1 + GAP) + 1e-9


@few
@given(instances())
def test_the_same_levels_come_out_twice(instance):
    assert instance.solved() == instance.solved()


@few
@given(instances(unit=2**30))
def test_gibibytes_are_counted_to_the_byte(instance):
    """HiGHS works with a relative tolerance of 1e-6: a thousand bytes in each gibibyte."""
    levels = instance.solved()
    fitting = list(instance.all_allowed())
    assert (levels is None) == (not fitting)
    if levels is not None:
        assert instance.allowed(levels)
        assert instance.cost(levels) <= min(map(instance.cost, fitting)) * (1 + GAP) + 1e-9


@pytest.mark.parametrize("short", [1, 1000])
def test_a_level_that_is_some_bytes_short_is_not_enough(short):
    gigabytes = 10**10
    items = (Item("a", (gigabytes - short, gigabytes + 1), (1.0, 2.0)),)
    assert Program(items, (Moment(2 * gigabytes, ((0, 1),)),)).levels_within(gigabytes) == (2,)


def test_a_budget_that_needs_no_compression_gets_none():
    items = (Item("a", (4,), (1.0,)), Item("b", (4,), (1.0,)))
    assert Program(items, (Moment(10, ((0, 1), (1, 1))), Moment(7, ()))).levels_within(10) == (0, 0)


def test_a_moment_where_nothing_is_alive_cannot_be_lowered():
    assert Program((Item("a", (4,), (1.0,)),), (Moment(10, ((0, 1),)), Moment(8, ()))).levels_within(7) is None


@pytest.mark.parametrize(("budget", "expected"), [(9, None), (10, ())])
def test_without_items_the_moments_fit_or_do_not(budget, expected):
    assert Program((), (Moment(10, ()),)).levels_within(budget) == expected


def test_the_first_of_a_group_is_compressed_first():
    items = tuple(Item("a", (4,), (1.0,)) for _ in range(4))
    alive = tuple((index, 1) for index in range(4))
    assert Program(items, (Moment(20, alive),)).levels_within(12) == (1, 1, 0, 0)


def test_items_of_different_groups_are_free_of_each_other():
    items = (Item("a", (4,), (2.0,)), Item("b", (4,), (1.0,)))
    assert Program(items, (Moment(10, ((0, 1), (1, 1))),)).levels_within(6) == (0, 1)


def test_a_storage_that_is_alive_twice_is_lowered_twice():
    assert Program((Item("a", (4,), (1.0,)),), (Moment(10, ((0, 2),)),)).levels_within(2) == (1,)


def transformer(num_layers: int, sizes: Sequence[int]) -> tuple[tuple[Item, ...], tuple[Moment, ...]]:
    """Four tensors a layer that live from the layer's forward to its backward, a moment at each change."""
    widths = (4096, 4096, 11008, 4096)
    items = tuple(
        Item(
            tensor,
            tuple(width * 8192 * 2 * (size - 1) // size for size in sizes),
            tuple(width * 4096 * math.log2(size) for size in sizes),
        )
        for tensor, width in enumerate(widths)
        for _ in range(num_layers)
    )
    moments = []
    for position in range(2 * num_layers * len(widths)):
        layer = min(position, 2 * num_layers * len(widths) - 1 - position) // len(widths)
        alive = tuple((tensor * num_layers + index, 1) for tensor in range(4) for index in range(layer + 1))
        held = sum(items[index].savings[-1] for index, _ in alive)
        moments.append(Moment(30 * 2**30 + 2 * held + 2**20 * (position % 7), alive))
    return items, tuple(moments)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_model_of_ordinary_size_is_solved_within_the_promised_gap(share, monkeypatch):
    """12 layers of 4 tensors at 7 sizes; the linear relaxation by its groups bounds the optimum from below."""
    items, moments = transformer(12, [2**power for power in range(1, 8)])
    highest = max(moment.peak_bytes for moment in moments)
    least = max(moment.bytes_at(items, [7] * len(items)) for moment in moments)
    budget = int(highest - (highest - least) * share)
    levels = Program(items, moments).levels_within(budget)
    assert levels is not None
    assert Instance(items, moments, budget).allowed(levels)
    top = max(moments, key=lambda moment: moment.peak_bytes)
    needed, bound = top.peak_bytes - budget, 0.0
    slopes = sorted(
        ((item.costs[level] - (0, *item.costs)[level]) / (item.savings[level] - (0, *item.savings)[level]),
         item.savings[level] - (0, *item.savings)[level])
        for item in items
        for level in range(7)
    )  # fmt: skip
    for slope, saving in slopes:
        taken = min(saving, needed)
        needed, bound = needed - taken, bound + slope * taken
    largest_step = max(item.costs[0] for item in items)
    assert bound * (1 - 1e-9) <= Instance(items, moments, budget).cost(levels) <= bound * (1 + GAP) + largest_step
    monkeypatch.setattr("velora_fx.choose.solver.RELATIVE_GAP", 0.0)
    exact = Instance(items, moments, budget).solved()
    assert exact is not None
    cost = Instance(items, moments, budget).cost
    assert cost(levels) <= cost(exact) * (1 + GAP)


def test_a_later_item_may_be_compressed_where_an_earlier_one_of_its_group_is_covered():
    items = (
        Item("a", (10,), (1.0,), covered_by=2),
        Item("a", (10,), (1.0,), covered_by=3),
        Item("blocks", (30,), (5.0,)),
        Item("blocks", (30,), (5.0,)),
    )
    assert Program(items, (Moment(100, ((0, 1), (1, 1), (2, 1), (3, 1))),)).levels_within(60) == (0, 1, 1, 0)


@few
@given(instances())
def test_from_everything_compressed_levels_are_lowered_until_none_can_be(instance):
    levels = trimmed(instance.items, instance.moments, instance.budget, highest_levels(instance.items))
    assume(instance.peak(tuple(highest_levels(instance.items))) <= instance.budget)
    assert instance.allowed(levels)
    for index, level in enumerate(levels):
        assert not any(instance.allowed((*levels[:index], lower, *levels[index + 1 :])) for lower in range(level))


def test_where_the_solver_finds_nothing_in_time_everything_is_compressed_that_has_to_be(monkeypatch):
    monkeypatch.setattr("velora_fx.choose.solver._solve", lambda items, constraints, seconds: None)
    items = (Item("a", (4, 8), (2.0, 3.0)), Item("b", (4,), (1.0,)))
    assert Program(items, (Moment(20, ((0, 1), (1, 1))),)).levels_within(9) == (2, 1)
    assert Program(items, (Moment(20, ((0, 1), (1, 1))),)).levels_within(12) == (2, 0)


def test_a_lower_moment_counts_at_which_something_is_alive_that_takes_more_than_it_frees():
    items = (Item("a", (10,), (1.0,)), Item("tied", (-50,), (), tied_to=(0,)))
    moments = (Moment(100, ((0, 1),)), Moment(99, ((0, 1), (1, 1))))
    assert Program(items, moments).levels_within(95) is None


@few
@given(instances())
def test_what_the_solver_compresses_too_far_is_lowered(instance):
    everything = sum(len(item.costs) for item in instance.items)
    with mock.patch("velora_fx.choose.solver._solve", lambda *_: np.ones(everything, dtype=int)):
        levels = instance.solved()
    assume(levels is not None)
    for index, level in enumerate(levels):
        assert not any(instance.allowed((*levels[:index], lower, *levels[index + 1 :])) for lower in range(level))


def test_of_an_item_and_those_that_it_covers_whatever_frees_more_goes_to_its_highest_level():
    inner = Item("a", (50,), (1.0,), covered_by=1)
    assert highest_levels([inner, Item("blocks", (30,), (1.0,))]) == [1, 0]
    assert highest_levels([inner, Item("blocks", (60,), (1.0,))]) == [0, 1]
