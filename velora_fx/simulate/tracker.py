"""Follows every storage that a piece of code allocates and frees, real or fake."""

from __future__ import annotations

import contextlib
import sys
import weakref
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from velora_fx.simulate.module_scopes import LOSS, Scope, Scopes
from velora_fx.simulate.observer import Observer, tensors_among
from velora_fx.simulate.timeline import Label, Place, Timeline

aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.clone.default, aten._reshape_copy.default)
PRODUCTS = (aten.mm.default, aten.addmm.default)
VIEWS = (aten.view.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class Birth:
    """How a storage came to be: in which moment of the step, for which scope, by which operator and as what tensor."""

    moment: str
    scope: Scope | None
    operator: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def label(self) -> Label:
        """The same in words."""
        parts = [str(self.scope)] if self.scope else []
        if self.moment != "forward":
            parts.insert(0, self.moment)
        tensor = f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"
        return Label(sys.intern(" of ".join(parts)), sys.intern(self.operator), sys.intern(tensor))


class Tracker(Observer):  # type: ignore[no-untyped-call]
    """Sees each new storage among the results of the operators, and its end through a weak reference.

    Storages are counted once however many tensors view them. `rounding_bytes` is the allocator's block size, `scopes`
    tells which module runs. `sources` maps a storage that is a copy or a cast of another to that one.
    """

    def __init__(self, rounding_bytes: int = 1, scopes: Scopes | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rounding_bytes = rounding_bytes
        self.scopes = scopes
        self.storages: list[int] = []
        self.deltas: list[int] = []
        self.categories: dict[int, str] = {}
        self.births: list[Birth | Label] = []
        self.marks: list[tuple[int, str]] = []
        self.places: list[tuple[int, str, Scope | None]] = []
        self.sources: dict[int, int] = {}
        self._live: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._kept: list[weakref.ref[torch.Tensor]] = []

    @property
    def now(self) -> int:
        """The number of events so far."""
        return len(self.deltas)

    @property
    def moment(self) -> str:
        """The moment of the step that runs now."""
        return self.marks[-1][1] if self.marks else ""

    def inside(self, name: str) -> contextlib.AbstractContextManager[None]:
        """The context in which the module of this name runs, for code that stands for a call of it."""
        return self.scopes.inside(name) if self.scopes else contextlib.nullcontext()

    def mark(self, moment: str) -> None:
        """Opens a moment of the step."""
        self.marks.append((self.now, moment))

    def watch(self, tensor: torch.Tensor, category: str | None = None, label: str | None = None) -> int:
        """Counts the tensor's storage, once, and returns its number; the last category and label given count."""
        number = self._count(tensor)
        if category is not None:
            self.categories[number] = category
        if label is not None:
            self.births[number] = Label(label)
        return number

    def watch_if_kept(self, tensor: torch.Tensor) -> None:
        """Counts the tensor's storage from the next operator on, if it is there then."""
        self._kept.append(weakref.ref(tensor))

    def discount(self, tensor: torch.Tensor) -> None:
        """Takes a storage that is there to the end as one that was never there."""
        self.deltas[self.storages.index(self.watch(tensor))] = 0

    def _count(self, tensor: torch.Tensor, func: Any = None, args: tuple[Any, ...] = ()) -> int:
        storage = tensor.untyped_storage()
        known = self._live.get(id(storage))
        if known is None:
            number, size = len(self.births), -(-storage.nbytes() // self.rounding_bytes) * self.rounding_bytes

            def freed(_: Any, key: int = id(storage)) -> None:
                del self._live[key]
                self._note(number, -size)

            self.births.append(self._birth(tensor, func, args))
            known = self._live[id(storage)] = (number, weakref.ref(storage, freed))
            self._note(number, size)
        return known[0]

    def _note(self, number: int, delta: int) -> None:
        self.storages.append(number)
        self.deltas.append(delta)

    def _birth(self, tensor: torch.Tensor, func: Any, args: tuple[Any, ...]) -> Birth:
        moment = self.moment
        scope = self.scopes.current() if self.scopes and moment in ("forward", "backward") else None
        if not self.places or self.places[-1][1:] != (moment, scope):
            self.places.append((self.now, moment, scope))
        operator = _operator(func)
        if func in PRODUCTS and moment == "forward" and self._is_parameter(args[-1]):
            operator = "linear"
        return Birth(moment, scope, operator, tuple(tensor.shape), tensor.dtype)

    def _is_parameter(self, tensor: torch.Tensor) -> bool:
        number, _ = self._live.get(id(tensor.untyped_storage()), (-1, None))
        return self.categories.get(self.sources.get(number, number)) == "parameters"

    def _reshape(self, number: int, shape: tuple[int, ...]) -> None:
        """A linear multiplies its rows as a matrix; people know its result by the shape that it gets at once."""
        birth = self.births[number]
        if isinstance(birth, Birth) and birth.operator == "linear" and len(birth.shape) == 2 < len(shape):
            self.births[number] = replace(birth, shape=shape)

    def name_loss(self, loss: torch.Tensor) -> None:
        """Has the scope in which the loss was made be the loss: it may be the end of the model's own forward."""
        birth = self.births[self.watch(loss)]
        if isinstance(birth, Birth) and birth.scope is not None and birth.scope.resumed:
            birth.scope.name = LOSS

    def is_made_from(self, storage: int, source: int) -> bool:
        """True for a storage that is another one, or a copy or a cast of it."""
        seen: int | None = storage
        while seen is not None and seen != source:
            seen = self.sources.get(seen)
        return seen is not None

    def live(self) -> list[int]:
        """The numbers of the storages in use."""
        return [number for number, _ in self._live.values()]

    def timeline(self) -> Timeline:
        """What was seen so far."""
        known: dict[Label, Label] = {}
        labels = [birth.label if isinstance(birth, Birth) else birth for birth in self.births]
        return Timeline(
            np.array(self.storages),
            np.array(self.deltas),
            dict(self.categories),
            tuple(self.marks),
            tuple(known.setdefault(label, label) for label in labels),
            _named(self.places),
        )

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Counts the storages of what an operator returned."""
        while self._kept:
            kept = self._kept.pop()()
            if kept is not None:
                self.watch(kept)
        if func in COPIES:
            self.sources[self._count(result, func, args)] = self.watch(args[0])
        for tensor in tensors_among(result):
            number = self._count(tensor, func, args)
            if func in VIEWS:
                self._reshape(number, tuple(tensor.shape))


def _operator(func: Any) -> str:
    """The name of an operator; compiled code gets its buffers empty, whatever its kernels write there."""
    if func in (None, aten.empty_strided.default):
        return ""
    schema = getattr(func, "_schema", None)  # an operator of operators has none
    name = str(schema.name).partition("::")[2].strip("_") if schema is not None else str(func)
    return "attention" if "attention" in name else name


def _named(places: list[tuple[int, str, Scope | None]]) -> tuple[Place, ...]:
    """The places in words: what runs in backward before any module does is its start."""
    named, started = [], False
    for event, moment, scope in places:
        started |= moment == "backward" and scope is not None and scope.name not in ("", LOSS)
        if moment == "backward" and not started:
            text = "start of backward"
        elif scope is None or scope.name == LOSS:
            text = moment
        else:
            text = f"{moment} of {scope}"
        in_loss = ", in the loss" if scope is not None and scope.name == LOSS else ""
        named.append(Place(event, text + in_loss, moment if scope is None else str(scope)))
    return tuple(named)
