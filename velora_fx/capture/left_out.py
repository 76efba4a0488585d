"""What stands in a copy of a model for blocks that are equal to the one before them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from velora_fx.capture.arguments import CONSTANTS, flatten, unflatten


class UnequalError(Exception):
    """Blocks that look equal are not called alike, so that few of them do not tell what many do."""


@dataclass
class PassedOn:
    """What a block was given by its last call and what it returned, without holding any of it."""

    structure: Any = None
    given: list[Any] = field(default_factory=list)
    output_structure: Any = None
    outputs: list[Any] = field(default_factory=list)

    def note(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Notes a call of the block."""
        self.structure, given = flatten([args, kwargs])
        self.output_structure, outputs = flatten(output)
        self.given, self.outputs = [_weak(leaf) for leaf in given], [_weak(leaf) for leaf in outputs]

    def again(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same output for an equal block that is called next, on what the block returned and what it was given.

        Raises UnequalError where it is called on anything else, or would return anything else.
        """
        structure, leaves = flatten([args, kwargs])
        if structure != self.structure:
            raise UnequalError("equal blocks are called in different ways")
        outputs = [_alive(output) for output in self.outputs]
        own = [output for output in outputs if isinstance(output, torch.Tensor)]
        for leaf, before in zip(leaves, self.given, strict=True):
            if not (_is_same(leaf, _alive(before)) or any(leaf is output for output in own)):
                raise UnequalError("equal blocks are given different things")
        if not all(isinstance(output, CONSTANTS) or any(leaf is output for leaf in leaves) for output in outputs):
            raise UnequalError("equal blocks return more than they pass on")
        return unflatten(self.output_structure, outputs)


class LeftOut(torch.nn.Module):
    """Takes the place of a block that is equal to the one before it: does nothing, and passes on what that returned."""

    def __init__(self, before: PassedOn) -> None:
        super().__init__()
        self.before = before

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block before returned."""
        return self.before.again(args, kwargs)


def note_calls(block: torch.nn.Module, passed_on: PassedOn) -> None:
    """Has `passed_on` note the calls of a block from now on: not as a hook does, with which a block is another one."""
    call: Callable[..., Any] = block._call_impl

    def noted(*args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        passed_on.note(args, kwargs, output)
        return output

    block._compiled_call_impl = noted


_GONE = object()  # stands for a thing that no longer is, and is the same as nothing


def _weak(leaf: Any) -> Any:
    if isinstance(leaf, CONSTANTS):
        return leaf
    try:
        return weakref.ref(leaf)
    except TypeError:
        return _GONE


def _alive(noted: Any) -> Any:
    if not isinstance(noted, weakref.ref):
        return noted
    value = noted()
    return _GONE if value is None else value


def _is_same(leaf: Any, before: Any) -> bool:
    if isinstance(leaf, CONSTANTS):
        return type(leaf) is type(before) and bool(leaf == before)
    return leaf is before
