"""Checkpoints that run in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from velora_fx.capture import Checkpoint, inlined_checkpoints, noted_checkpoints


def calls_of(run: Callable[[Any, Tensor], Tensor]) -> int:
    """How often the forward and the backward of what it returns call the function that it is given."""
    calls = []

    def function(x: Tensor) -> Tensor:
        calls.append(x)
        return x.exp()

    x = torch.ones(3, requires_grad=True)
    run(function, x).sum().backward()
    assert torch.equal(x.grad, x.exp())
    return len(calls)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_is_checkpointed_runs_once_and_keeps_what_it_computes(use_reentrant: bool) -> None:
    def inlined(function: Any, x: Tensor) -> Tensor:
        with inlined_checkpoints() as opened:
            y: Tensor = checkpoint(function, x, use_reentrant=use_reentrant)
        assert not opened
        return y

    assert calls_of(inlined) == 1
    assert calls_of(partial(checkpoint, use_reentrant=use_reentrant)) == 2  # afterwards it recomputes again


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
    assert calls_of(Checkpoint(use_reentrant, True)) == 2


def test_an_error_inside_leaves_nothing_open() -> None:
    def function(x: Tensor) -> Tensor:
        raise ValueError("no")

    with inlined_checkpoints() as opened:
        with pytest.raises(ValueError, match="no"):
            checkpoint(function, torch.ones(3), use_reentrant=True)
        assert not opened
