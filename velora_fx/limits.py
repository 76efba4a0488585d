"""What a forward may not do where a graph is to stand for it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode


class CaptureError(Exception):
    """A module whose forward cannot be captured; the text says why."""


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Raises CaptureError where the code inside does what torch.export would lose without a word.

    That is a backward of its own (`autograd.Function`, tensor hooks), packing of saved tensors (checkpointing), random
    numbers from elsewhere than PyTorch's global state, and a change of the grad mode inside an autocast stretch. A
    forward that asks for values gets it too: torch.export would print the graph so far.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    own_backward = replaced(torch.autograd.Function, "apply", classmethod(_apply))
    try:
        with own_backward, replaced(saved_tensors_hooks, "__enter__", _enter), _Watch():
            try:
                yield
            except GuardOnDataDependentSymNode as error:
                raise CaptureError(
                    "its forward branches on the values of tensors, which a graph would not do"
                ) from error
        same_numpy = all(np.array_equal(a, b) for a, b in zip(numpy_state, np.random.get_state(), strict=True))
        if random.getstate() != python_state or not same_numpy:
            raise CaptureError("its forward draws random numbers from Python or NumPy")
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


class _Watch(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.depth = autocast_depth()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch._C._set_grad_enabled and autocast_depth() > self.depth:
            raise CaptureError("its forward changes the grad mode within an autocast stretch")
        if func in (torch.Tensor.register_hook, torch.Tensor.retain_grad):
            raise CaptureError(f"its forward calls {func.__name__} on a tensor, which a graph would not do")
        if (kwargs or {}).get("generator") is not None:
            raise CaptureError("its forward draws random numbers from a generator of its own")
        return func(*args, **(kwargs or {}))


def autocast_depth() -> int:
    """How many autocast contexts are open."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


_original_apply = torch.autograd.Function.__dict__["apply"]


def _apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
    if cls.__name__.startswith("GeneratedBackwardFor_"):  # of an operator of torch.library, a node of the graph
        return _original_apply.__get__(None, cls)(*args, **kwargs)
    raise CaptureError(f"its forward calls {cls.__name__}, an autograd.Function, whose backward a graph would not run")


def _enter(self: saved_tensors_hooks) -> None:
    raise CaptureError(
        "its forward recomputes or moves what is saved for backward (checkpointing, saved_tensors_hooks)"
    )


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Callable[..., Any] | classmethod[Any, Any, Any]) -> Iterator[None]:
    """Sets an attribute of a class or a module for a while."""
    original = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
