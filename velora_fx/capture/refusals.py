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
def refusals(own_backwards: bool = False) -> Iterator[None]:
    """Raises CaptureError where the code inside does what torch.export would lose without a word.

    That is a backward of its own (`autograd.Function`, tensor hooks), packing of saved tensors (checkpointing), random
    numbers from elsewhere than PyTorch's global state, and a change of the grad mode inside an autocast stretch. A
    forward that asks for values gets it too: torch.export would print the graph so far. With `own_backwards` an
    `autograd.Function` runs its forward as operations like any other: for a graph that is never trained.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    apply = _forward_alone if own_backwards else _apply
    own_backward = replaced(torch.autograd.Function, "apply", classmethod(apply))
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


class _Context(torch.autograd.function.FunctionCtx):
    """What the forward of an `autograd.Function` writes to where nobody reads it."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.needs_input_grad = tuple(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args)


def _forward_alone(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
    if cls.__name__.startswith("GeneratedBackwardFor_"):
        return _original_apply.__get__(None, cls)(*args, **kwargs)
    has_own_context = cls.setup_context is torch.autograd.Function.setup_context
    with _Differentiable(cls):
        return cls.forward(_Context(args), *args, **kwargs) if has_own_context else cls.forward(*args, **kwargs)


class _Differentiable(TorchFunctionMode):
    """Refuses operators that are not PyTorch's own, as those for quantised weights: the function alone knows their
    gradient."""

    def __init__(self, cls: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.name = cls.__name__

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "namespace", "aten") not in ("aten", "prim", "prims"):
            raise CaptureError(f"its forward calls {self.name}, an autograd.Function around the operator {func}")
        return func(*args, **(kwargs or {}))


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
