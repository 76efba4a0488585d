"""Functions that hold parts of a model, for a copy of it: `copy.deepcopy` copies no function."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import torch

FUNCTIONS = (FunctionType, MethodType, partial)


def rebind_functions(model: torch.nn.Module, memo: dict[int, Any]) -> None:
    """Has the functions among the attributes of a copied model's modules hold the parts of the copy.

    Libraries and scripts put such functions in the place of a forward, and call from there the one before. `memo` is
    that of `copy.deepcopy(model, memo)`. Followed is what closures, methods, partials and callable objects hold, and
    the global variables of functions.
    """
    rebound = _Rebound(memo)
    for module in model.modules():
        copied = memo.get(id(module))
        if type(copied) is not type(module):  # left out
            continue
        attributes = vars(copied)
        for name, value in vars(module).items():
            if name == "_compiled_call_impl":  # `copy.deepcopy` leaves it out too
                continue
            if isinstance(value, FUNCTIONS) or (callable(value) and id(value) in memo):
                attributes[name] = rebound(value)


@dataclass
class _Rebound:
    """Gives a value with the copies in `memo` in the place of what they are copies of."""

    memo: dict[int, Any]
    visited: set[int] = field(default_factory=set)

    def __call__(self, value: Any) -> Any:
        if isinstance(value, torch.nn.Module):
            return self.memo.get(id(value), value)
        if isinstance(value, MethodType):
            return MethodType(self(value.__func__), self(value.__self__))
        if isinstance(value, FunctionType):
            return self.memo[id(value)] if id(value) in self.memo else self.function(value)
        if type(value) is partial:
            made = partial(self(value.func), *map(self, value.args), **self(value.keywords))
            vars(made).update(self(vars(value)))
            return made
        if type(value) in (list, tuple, set):
            return type(value)(map(self, value))
        if type(value) is dict:
            return {key: self(item) for key, item in value.items()}
        if isinstance(value, torch.autocast):  # it holds what was before it, and is entered while the model is planned
            return self.memo.setdefault(id(value), copy.copy(value))
        return self.object(value) if callable(value) else self.memo.get(id(value), value)

    def function(self, function: FunctionType) -> FunctionType:
        """A copy of a function that holds something of its own; others are what they are."""
        held, variables = function.__closure__ or (), function.__globals__
        names = {name for code in _codes(function.__code__) for name in code.co_names if name in variables}
        changed = {name: self(variables[name]) for name in names if self.is_copied(variables[name])}
        if not (held or changed):
            return function
        cells = tuple(CellType() for _ in held)
        scope = {**variables, **changed} if changed else variables
        made = FunctionType(function.__code__, scope, function.__name__, None, cells)
        self.memo[id(function)] = made
        for cell, own in zip(cells, held, strict=True):
            if _is_filled(own):
                cell.cell_contents = self(own.cell_contents)
        made.__defaults__, made.__kwdefaults__ = self((function.__defaults__, function.__kwdefaults__))
        made.__annotations__, made.__qualname__ = function.__annotations__, function.__qualname__
        made.__dict__.update(self(vars(function)))
        return made

    def object(self, value: Any) -> Any:
        """A callable object, copied with the functions that it holds."""
        holds = {
            k: v for k, v in getattr(value, "__dict__", {}).items() if isinstance(v, FUNCTIONS) or self.is_copied(v)
        }
        if id(value) not in self.visited and holds and not isinstance(value, type):
            self.visited.add(id(value))
            copied = self.memo.setdefault(id(value), _shallow_copy(value))
            if vars(copied) is not vars(value):
                vars(copied).update({name: self(item) for name, item in holds.items()})
        return self.memo.get(id(value), value)

    def is_copied(self, value: Any) -> bool:
        """True for a part of the model, and for a method of one."""
        return id(value.__self__ if isinstance(value, MethodType) else value) in self.memo


def _shallow_copy(value: Any) -> Any:
    """An object of the same class and attributes, also where that forbids to be pickled; one made in C is itself."""
    try:
        copied = object.__new__(type(value))
    except TypeError:
        return value
    vars(copied).update(vars(value))
    return copied


def _is_filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a function and of those inside of it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
