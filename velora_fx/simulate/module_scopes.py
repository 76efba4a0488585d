"""Whose forward or backward runs: the innermost module, by its dotted name."""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

LOSS = "loss"


@dataclass(eq=False)
class Scope:
    """A stretch of the forward in one module, "" for the model itself; `resumed` after a call of a module inside."""

    name: str
    resumed: bool = False

    def __str__(self) -> str:
        return self.name or "the model"


class Scopes:
    """Follows the calls of a model's modules while it is on; what runs outside of all of them is the loss.

    Backward calls no modules. There a node of autograd belongs to the stretch of the forward that made it, which its
    sequence number tells.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        self._owners = {
            id(parameter): Scope(name)
            for name, module in model.named_modules()
            for parameter in module.parameters(recurse=False)
        }
        self._open: list[Scope] = []
        self._starts = [0]
        self._stretches = [Scope(LOSS)]

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """The context in which modules are followed, by way of `Module.__call__` as `torch.fx.Tracer` does it.

        Hooks would not do: a region with hooks inside runs its original forward.
        """
        original = torch.nn.Module.__call__

        def call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            name = self._names.get(id(module))
            if name is None:
                return original(module, *args, **kwargs)
            with self.inside(name):
                return original(module, *args, **kwargs)

        torch.nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.nn.Module.__call__ = original  # type: ignore[method-assign]

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """The context in which the module of this name runs."""
        self._open.append(Scope(name))
        self._begin(self._open[-1])
        try:
            yield
        finally:
            self._open.pop()
            if self._open:
                self._open[-1] = Scope(self._open[-1].name, resumed=True)
            self._begin(self._open[-1] if self._open else Scope(LOSS))

    def _begin(self, scope: Scope) -> None:
        self._starts.append(torch._C._autograd._get_sequence_nr())
        self._stretches.append(scope)

    def current(self) -> Scope:
        """What runs now: a module that is called (in backward: called again), else that of the node of autograd."""
        node = None if self._open else torch._C._current_autograd_node()
        if node is None:
            return self._stretches[-1]
        variable = getattr(node, "variable", None)
        if variable is not None:  # the node that adds up a gradient, which has no number
            return self._owners.get(id(variable), self._stretches[0])
        return self._stretches[bisect_right(self._starts, node._sequence_nr()) - 1]
