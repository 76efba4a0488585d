"""The tracker sees every storage come and go, once each, as the real allocator does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.helpers.allocator import peak_of, point, totals_at_points
from tests.helpers.examples import for_any
from tests.helpers.zoo import ZOO, loss_of
from velora_fx.simulate import Tracker, fake_copy, fake_mode, fake_tensor

ITEM = 4
SIZE = 12  # elements of a leaf: one size, so that any two tensors can be multiplied


class Both(torch.autograd.Function):
    """Saves what it was given and what it returns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x * x
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        x, y = ctx.saved_tensors
        return gradients[0] * x * y


def flat(x: Tensor) -> Tensor:
    """The tensor as a vector of SIZE: a view where it can be."""
    return x.reshape(-1).repeat(SIZE)[:SIZE] if x.numel() not in (0, SIZE) else x.reshape(-1)


ACTIONS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "multiply": lambda x, y: flat(x) * flat(y) if x.numel() and y.numel() else x,
    "exp": lambda x, y: x.exp(),
    "both": lambda x, y: Both.apply(x),  # type: ignore[no-untyped-call]
    "clone": lambda x, y: x.clone(),
    "detach": lambda x, y: x.detach(),
    "alias": lambda x, y: x,
    "slice": lambda x, y: x.reshape(-1)[2:5],
    "transpose": lambda x, y: x.reshape(-1, 1).t(),
    "expand": lambda x, y: x.unsqueeze(0).expand(3, *x.shape)[0],
    "add in place": lambda x, y: x.data.add_(1),  # `data` since backward refuses what was saved and then changed
    "pieces": lambda x, y: x.reshape(-1).split(5),
    "pair of views": lambda x, y: [x.view_as(x), x.view_as(x)],
    "foreach": lambda x, y: torch._foreach_add([x.detach(), y.detach(), x.detach()], 1.0),
    "foreach in place": lambda x, y: torch._foreach_mul_([x.data, y.clone().data], 2.0),
    "without grad": lambda x, y: [torch.no_grad()(torch.neg)(x)],
}
programs = st.lists(
    st.tuples(st.sampled_from(["leaf", "constant", "drop", "drop", *ACTIONS]), st.integers(0, 20), st.integers(0, 20)),
    min_size=8,
    max_size=40,
)


def run(
    program: list[tuple[str, int, int]], make: Callable[[bool], Tensor], at_point: Callable[[list[Tensor]], None]
) -> None:
    """Runs a program and a backward pass of all it has made; `at_point` is called with what is held."""
    tensors: list[Tensor] = []
    for action, first, second in program:
        if action in ("leaf", "constant") or not tensors:
            tensors.append(make(action == "leaf"))
        elif action == "drop":
            tensors.pop(first % len(tensors))
        else:
            made = ACTIONS[action](tensors[first % len(tensors)], tensors[second % len(tensors)])
            tensors += [made] if isinstance(made, Tensor) else made
            del made
        at_point(tensors)
    outputs = [tensor for tensor in tensors if tensor.requires_grad and tensor.numel()]
    if outputs and torch.is_grad_enabled():
        torch.autograd.backward([output.sum() for output in outputs])
    tensors = [tensor for tensor in tensors if tensor.is_leaf]
    del outputs
    at_point(tensors)
    tensors.clear()
    at_point(tensors)


def real(requires_grad: bool) -> Tensor:
    return torch.empty(SIZE).fill_(0.5).requires_grad_(requires_grad)


def fakes() -> Callable[[bool], Tensor]:
    mode = fake_mode()

    def fake(requires_grad: bool) -> Tensor:
        with mode:
            return real(requires_grad)

    return fake


@for_any(programs, st.booleans(), st.sampled_from([1, 512]))
def test_the_bytes_in_use_are_those_of_the_storages_with_a_user(program, without_memory, rounding):
    """Against a count of references; views, aliases and results written in place have the storage of their base."""
    tracker = Tracker(rounding)

    def at_point(tensors: list[Tensor]) -> None:
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
        assert sum(tracker.deltas) == sum(-(-size // rounding) * rounding for size in storages.values())
        assert len(tracker.live()) == len(storages)

    with tracker, torch.no_grad():
        run(program, fakes() if without_memory else real, at_point)


@for_any(programs)
def test_the_bytes_in_use_are_the_allocators_at_every_point(program):
    """No storage is let go of while a view, an alias, a list or the graph needs it, and each is counted once."""
    tracker, seen = Tracker(), []

    def at_point(_: list[Tensor]) -> None:
        seen.append(sum(tracker.deltas))
        point()

    def step() -> None:
        with tracker:
            run(program, real, at_point)

    assert totals_at_points(step) == seen
    assert seen[-1] == 0


@for_any(programs)
def test_a_storage_is_born_before_it_dies_and_no_number_is_used_twice(program):
    tracker = Tracker()
    with tracker:
        run(program, real, lambda _: None)
    alive: set[int] = set()
    for event, (storage, delta) in enumerate(zip(tracker.storages, tracker.deltas, strict=True)):
        assert (storage in alive) == (tracker.storages.index(storage) < event)
        alive ^= {storage}
        assert delta >= 0 if storage in alive else delta <= 0
    assert not alive and tracker.live() == [] and sum(tracker.deltas) == 0
    timeline = tracker.timeline()
    assert set(timeline.births) == set(timeline.deaths) == set(range(len(timeline.labels)))


@for_any(programs)
def test_without_memory_a_program_has_the_same_events(program):
    deltas = []
    for make in (real, fakes()):
        tracker = Tracker()
        with tracker:
            run(program, make, lambda _: None)
        deltas.append(tracker.deltas)
    assert deltas[0] == deltas[1]


def test_a_storage_saved_for_backward_stays_until_the_backward_pass():
    weight, tracker = torch.ones(8, requires_grad=True), Tracker()
    with tracker:
        loss = (weight * 2).exp().sum()
        assert sum(tracker.deltas) == 8 * ITEM + ITEM  # what exp returned, and the loss
        loss.backward()
        assert sum(tracker.deltas) == 8 * ITEM + ITEM  # the gradient, and the loss
        del loss
        assert sum(tracker.deltas) == 8 * ITEM


def test_a_storage_is_counted_once_and_whole_however_often_it_or_a_view_is_watched():
    x, tracker = torch.zeros(8), Tracker()
    assert tracker.watch(x[2:4]) == tracker.watch(x) == tracker.watch(x.view(2, 4)) == tracker.watch(x[3:].detach())
    assert tracker.deltas == [8 * ITEM]


def test_the_end_of_a_watched_storage_is_seen_outside_of_the_context():
    x, tracker = torch.zeros(8), Tracker()
    number = tracker.watch(x)
    view = x[2:]
    del x
    assert tracker.deltas == [8 * ITEM]
    del view
    assert (tracker.storages, tracker.deltas) == ([number, number], [8 * ITEM, -8 * ITEM])


def test_a_storage_at_the_address_of_a_dead_one_has_a_number_of_its_own():
    tracker = Tracker()
    numbers = []
    for _ in range(20):
        with tracker:
            x = torch.empty(16)
        numbers.append(tracker.watch(x))
        del x
    assert len(set(numbers)) == 20
    assert sum(tracker.deltas) == 0


def test_the_last_category_given_counts():
    x, tracker = torch.zeros(8), Tracker()
    number = tracker.watch(x, "activations")
    tracker.watch(x.view(4, 2), "gradients")
    tracker.watch(x)
    assert tracker.categories == {number: "gradients"}


def test_marks_open_moments_at_the_next_event_and_a_timeline_is_a_copy_that_later_ones_do_not_change():
    tracker = Tracker()
    tracker.mark("forward")
    x = torch.zeros(8)
    tracker.watch(x, "activations")
    timeline = tracker.timeline()
    tracker.mark("backward")
    assert tracker.marks == [(0, "forward"), (1, "backward")] and tracker.now == 1
    del x
    assert timeline.deltas.tolist() == [8 * ITEM]
    assert (timeline.marks, dict(timeline.categories)) == (((0, "forward"),), {0: "activations"})


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


class Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
        return x


def assert_seen_as_measured(model: nn.Module, batch: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """The tracker's peak of a training step is within 0.1% of the allocator's."""

    def step() -> None:
        loss_of(model(**batch)).backward()
        optimizer.step()

    step()
    optimizer.zero_grad()
    measured = peak_of(step)
    optimizer.zero_grad()
    tracker = Tracker()
    states = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    for tensor in (*batch.values(), *model.parameters(), *model.buffers(), *states):
        tracker.watch(tensor)
    before = sum(tracker.deltas)
    with tracker:
        step()
    seen = int(np.cumsum(tracker.deltas).max()) - before
    assert abs(seen - measured) <= 1e-3 * measured


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [(Encoder, torch.optim.AdamW), (Recomputed, torch.optim.SGD)],
    ids=lambda class_: class_.__name__,
)
def test_the_peak_of_a_real_training_step_is_the_allocators(kind, optimizer):
    torch.manual_seed(0)
    model = kind().train()
    assert_seen_as_measured(model, {"x": torch.randn(8, 96, 64)}, optimizer(model.parameters(), lr=1e-3))


@pytest.mark.parametrize("case", [case for case in ZOO if case.name in ("llama", "mixtral")], ids=str)
def test_the_peak_of_a_models_real_training_step_is_the_allocators(case):
    model = case.build()
    assert_seen_as_measured(model, case.batch(4, 48), torch.optim.AdamW(model.parameters()))


def test_a_fake_step_has_the_events_of_the_real_one():
    torch.manual_seed(0)
    model, x = Recomputed().train(), torch.randn(4, 6, 64)
    deltas = []
    mode = fake_mode()
    for one, inputs in ((model, x), (fake_copy(model, mode), fake_tensor(x, mode))):
        tracker = Tracker()
        with tracker:
            one(inputs).sum().backward()
        deltas.append(tracker.deltas)
    assert deltas[0] == deltas[1]


def test_a_storage_is_known_by_its_operator_until_it_is_given_a_name():
    tracker = Tracker()
    with tracker:
        x = torch.zeros(2, 3)
        y = x.view(6)
    assert [str(label) for label in tracker.timeline().labels] == ["zeros [2, 3] float32"]
    tracker.watch(y, label="tokens")
    tracker.watch(x)
    assert [str(label) for label in tracker.timeline().labels] == ["tokens"]
