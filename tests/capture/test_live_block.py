"""A block that is looked at again and again is seen as it is, whatever changed between two looks."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.helpers.toys import Block
from velora_fx.capture import Call, LiveBlock, flatten, key_of, state_of


def _tie(block: nn.Module) -> None:
    block.up.bias, block.tied = nn.Parameter(torch.ones(64)), nn.Module()
    block.tied.bias = block.up.bias


def _data_of_another_dtype(block: nn.Module) -> None:
    block.up.weight.data = block.up.weight.data.double()


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "nothing": lambda block: None,
    "another dtype": lambda block: block.double(),
    "another device": lambda block: block.to("meta"),
    "data of another dtype": _data_of_another_dtype,
    "a frozen weight": lambda block: block.up.weight.requires_grad_(False),
    "an inner module in eval": lambda block: block.up.eval(),
    "another module": lambda block: setattr(block, "up", nn.Identity()),
    "one more module": lambda block: block.add_module("more", nn.Linear(2, 2)),
    "a shared module": lambda block: block.add_module("more", block.up),
    "a removed module": lambda block: delattr(block, "up"),
    "a module of another class": lambda block: setattr(block.up, "__class__", type("Other", (nn.Linear,), {})),
    "another parameter": lambda block: setattr(block.up, "weight", nn.Parameter(torch.ones(64, 32))),
    "tied parameters": _tie,
    "no bias": lambda block: setattr(block.up, "bias", None),
    "a buffer": lambda block: block.up.register_buffer("scale", torch.ones(1)),
    "a replaced forward": lambda block: setattr(block.up, "forward", lambda x: x),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_look_after_a_change_is_a_first_look(change: str) -> None:
    block = Block()
    live = LiveBlock(block)
    live.look()
    CHANGES[change](block)
    seen, state = live.look(), state_of(block)
    structure, leaves = flatten(((), {}))
    call = Call(block, (), {}, structure, leaves, state)
    assert key_of(call, seen.key) == key_of(call)
    assert list(seen.state) == list(state) and all(seen.state[name] is tensor for name, tensor in state.items())


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_inside_are_seen_while_they_hang_and_those_on_the_block_are_not(kind: str) -> None:
    block = Block()
    live = LiveBlock(block)
    getattr(block, f"register_{kind}_hook")(lambda *_: None)
    assert not live.look().has_hooks
    handle = getattr(block.up, f"register_{kind}_hook")(lambda *_: None)
    assert live.look().has_hooks
    handle.remove()
    assert not live.look().has_hooks


def test_a_copy_looks_at_the_copied_block() -> None:
    block = Block()
    block.live = LiveBlock(block)
    block.live.look()
    twin = copy.deepcopy(block)
    assert all(twin.live.look().state[name] is tensor for name, tensor in state_of(twin).items())
