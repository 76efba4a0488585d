"""Checkpoints that run in place."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from velora_fx.capture import Checkpoint, inlined_checkpoints, noted_checkpoints


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_is_checkpointed_runs_once_and_keeps_what_it_computes(use_reentrant: bool) -> None:
    calls = []

    def function(x: Tensor) -> Tensor:
        calls.append(x)
        return x.exp()

    x = torch.ones(3, requires_grad=True)
    with inlined_checkpoints() as opened:
        y = checkpoint(function, x, use_reentrant=use_reentrant)
    assert not opened
    y.sum().backward()
    assert len(calls) == 1
    assert x.grad is not None and torch.equal(x.grad, x.exp())


def test_inside_the_list_holds_each_open_checkpoint() -> None:
    contexts = partial(create_selective_checkpoint_contexts, [])
    seen: list[Any] = []

    def inner(x: Tensor) -> Tensor:
        seen.append([one.context_fn for one in opened])
        return x.exp()

    def outer(x: Tensor) -> Tensor:
        return checkpoint(inner, x, use_reentrant=False, context_fn=contexts)  # type: ignore[no-any-return]

    with inlined_checkpoints() as opened:
        checkpoint(outer, torch.ones(3), use_reentrant=False)
    assert seen == [[None, contexts]]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_noted_checkpoints_recompute_as_ever(use_reentrant: bool) -> None:
    seen: list[list[Checkpoint]] = []
    opened: list[Checkpoint] = []

    def function(x: Tensor) -> Tensor:
        seen.append(list(opened))
        return x.exp()

    x = torch.ones(3, requires_grad=True)
    with noted_checkpoints(opened):
        y = checkpoint(function, x, use_reentrant=use_reentrant, preserve_rng_state=False)
        assert not opened
    y.sum().backward()
    assert seen == [[Checkpoint(use_reentrant, False)], []]
    assert x.grad is not None and torch.equal(x.grad, x.exp())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_is_called_again_for_another_function(use_reentrant: bool) -> None:
    calls = []

    def function(x: Tensor) -> Tensor:
        calls.append(x)
        return x.exp()

    x = torch.ones(3, requires_grad=True)
    Checkpoint(use_reentrant, True)(function, x).sum().backward()
    assert len(calls) == 2
    assert x.grad is not None and torch.equal(x.grad, x.exp())


def test_afterwards_checkpoints_recompute_again() -> None:
    calls = []

    def function(x: Tensor) -> Tensor:
        calls.append(x)
        return x.exp()

    with inlined_checkpoints():
        pass
    checkpoint(function, torch.ones(3, requires_grad=True), use_reentrant=False).sum().backward()
    assert len(calls) == 2


def test_an_error_inside_leaves_nothing_open() -> None:
    def function(x: Tensor) -> Tensor:
        raise ValueError("no")

    with inlined_checkpoints() as opened:
        with pytest.raises(ValueError, match="no"):
            checkpoint(function, torch.ones(3), use_reentrant=True)
        assert not opened
