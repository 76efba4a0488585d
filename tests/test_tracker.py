"""The tracker sees every storage come and go, once each, as the real allocator does."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.allocator import peak_of
from tests.zoo import ZOO, loss_of
from velora_fx.fake import fake_copy, fake_mode, fake_tensor
from velora_fx.tracker import Tracker

few = settings(max_examples=60, deadline=None, derandomize=True)
ITEM = 4

# One step of a program on a list of tensors: what to do, with which of them, and a size where one is made.
steps = st.lists(
    st.tuples(
        st.sampled_from(["make", "compute", "slice", "transpose", "detach", "expand", "add_", "drop", "copy", "two"]),
        st.integers(0, 9),
        st.integers(0, 40),
    ),
    max_size=40,
)
NEW_STORAGE = ("make", "compute", "copy")


def perform(action: str, chosen: Tensor, size: int) -> list[Tensor]:
    made: dict[str, Callable[[], Tensor | tuple[Tensor, ...]]] = {
        "make": lambda: torch.empty(size),
        "compute": lambda: chosen.contiguous() * 2,
        "copy": chosen.clone,
        "slice": lambda: chosen[: size % 5],
        "transpose": lambda: chosen.reshape(-1, 1).t() if chosen.is_contiguous() else chosen,
        "detach": chosen.detach,
        "expand": lambda: chosen.unsqueeze(0).expand(3, *chosen.shape),
        "add_": lambda: chosen.add_(1) if chosen.is_contiguous() else chosen,
        "two": lambda: chosen.split(max(1, size)) if chosen.dim() else chosen,
    }
    result = made[action]()
    return list(result) if isinstance(result, tuple) else [result]


@few
@given(steps, st.booleans(), st.sampled_from([1, 512]))
def test_the_bytes_in_use_are_those_of_the_storages_with_a_user(program, fake, rounding):
    """Against a count of references; views, aliases and results written in place have the storage of their base."""
    mode = fake_mode()
    tracker = Tracker(rounding)
    tensors: list[Tensor] = []
    for action, index, size in program:
        if action == "drop":
            if tensors:
                tensors.pop(index % len(tensors))
        else:
            if action == "make" or not tensors:
                with tracker, mode if fake else torch.no_grad():
                    tensors.append(torch.empty(size))
            else:
                chosen = tensors[index % len(tensors)]
                with tracker, torch.no_grad():
                    tensors.extend(perform(action, chosen, size))
                del chosen
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
        assert sum(tracker.deltas) == sum(-(-size // rounding) * rounding for size in storages.values())
        assert len(tracker.live()) == len(storages)


def test_a_storage_saved_for_backward_stays_until_the_backward_pass():
    weight, tracker = torch.ones(8, requires_grad=True), Tracker()
    with tracker:
        loss = (weight * 2).exp().sum()
        assert sum(tracker.deltas) == 8 * ITEM + ITEM  # what exp returned, and the loss
        loss.backward()
        assert sum(tracker.deltas) == 8 * ITEM + ITEM  # the gradient, and the loss
        del loss
        assert sum(tracker.deltas) == 8 * ITEM


def test_a_storage_is_counted_once_however_often_it_is_watched():
    x, tracker = torch.zeros(8), Tracker()
    assert tracker.watch(x) == tracker.watch(x.view(2, 4)) == tracker.watch(x[3:].detach())
    assert tracker.deltas == [8 * ITEM]


def test_a_view_counts_all_of_its_storage():
    tracker = Tracker()
    tracker.watch(torch.zeros(8)[2:4])
    assert tracker.deltas[0] == 8 * ITEM


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


def test_marks_open_moments_at_the_next_event():
    tracker = Tracker()
    tracker.mark("forward")
    x = torch.zeros(8)
    tracker.watch(x)
    tracker.mark("backward")
    assert tracker.marks == [(0, "forward"), (1, "backward")] and tracker.now == 1


def test_a_timeline_is_a_copy_that_later_events_do_not_change():
    tracker = Tracker()
    tracker.mark("forward")
    x = torch.zeros(8)
    tracker.watch(x, "activations")
    timeline = tracker.timeline()
    del x
    tracker.mark("backward")
    assert timeline.deltas.tolist() == [8 * ITEM]
    assert (timeline.marks, dict(timeline.categories)) == (((0, "forward"),), {0: "activations"})


def test_nothing_is_kept_alive():
    tracker = Tracker()
    with tracker:
        kept = [torch.empty(4) for _ in range(3)]
    del kept
    gc.collect()
    assert tracker.live() == [] and sum(tracker.deltas) == 0


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
