"""A compiled model as one node of autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from velora_fx.simulate import Tracker, fake_mode, fake_tensor
from velora_fx.simulate.compiled.autograd_node import OneGraph


def run(tensors: Sequence[Tensor]) -> list[Tensor]:
    x, w, frozen = tensors
    h = x @ w
    return [h.square().sum(), h, (x * frozen).detach()]


def fakes() -> list[Tensor]:
    mode = fake_mode()
    x, w, frozen = torch.randn(4, 8), torch.randn(8, 2), torch.randn(8)
    made = [fake_tensor(tensor, mode) for tensor in (x, w, frozen)]
    made[1].requires_grad_()
    return made


def test_gradients_go_to_what_wants_one_and_have_its_shape() -> None:
    x, w, frozen = fakes()
    loss, h, detached = OneGraph.apply(run, x, w, frozen)  # type: ignore[no-untyped-call]
    assert h.requires_grad and not detached.requires_grad
    loss.backward()
    assert w.grad is not None and w.grad.shape == w.shape
    assert x.grad is None and frozen.grad is None


def test_an_output_that_no_loss_uses_gets_zeros_for_as_long_as_its_graph_has_not_run() -> None:
    x, w, frozen = fakes()
    tracker = Tracker()
    with tracker:
        loss, h, _ = OneGraph.apply(run, x, w, frozen)  # type: ignore[no-untyped-call]
        size = h.untyped_storage().nbytes()
        del h, _
        start = tracker.now
        loss.backward()
    deltas = tracker.timeline().deltas[start:].tolist()
    assert size in deltas and -size in deltas[deltas.index(size) :]


def test_what_backward_does_not_need_is_freed_when_the_forward_ends() -> None:
    x, w, frozen = fakes()
    tracker = Tracker()
    with tracker:
        loss = OneGraph.apply(lambda tensors: [run(tensors)[1].exp().sum()], x, w, frozen)[0]  # type: ignore[no-untyped-call]
        held = set(tracker.live())
        loss.backward()
    assert held
    assert not held & set(tracker.live()) - {tracker.watch(tensor) for tensor in (x, w, frozen, loss)}
