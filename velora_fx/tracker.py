"""Follows every storage that a piece of code allocates and frees, real or fake."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from velora_fx.timeline import Timeline

aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.clone.default, aten._reshape_copy.default)


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While on, sees each new storage among the results of the operators, and its end through a weak reference.

    Storages are counted once however many tensors view them. `rounding_bytes` is the allocator's block size. `sources`
    maps a storage that is a copy or a cast of another to that one.
    """

    supports_higher_order_operators = True

    def __init__(self, rounding_bytes: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rounding_bytes = rounding_bytes
        self.storages: list[int] = []
        self.deltas: list[int] = []
        self.categories: dict[int, str] = {}
        self.marks: list[tuple[int, str]] = []
        self.sources: dict[int, int] = {}
        self._live: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._count = 0

    @property
    def now(self) -> int:
        """The number of events so far."""
        return len(self.deltas)

    def mark(self, moment: str) -> None:
        """Opens a moment of the step."""
        self.marks.append((self.now, moment))

    def watch(self, tensor: torch.Tensor, category: str | None = None) -> int:
        """Counts the tensor's storage, once, and returns its number."""
        storage = tensor.untyped_storage()
        known = self._live.get(id(storage))
        if known is None:
            number, size = self._count, -(-storage.nbytes() // self.rounding_bytes) * self.rounding_bytes
            self._count += 1

            def freed(_: Any, key: int = id(storage)) -> None:
                del self._live[key]
                self.storages.append(number)
                self.deltas.append(-size)

            known = self._live[id(storage)] = (number, weakref.ref(storage, freed))
            self.storages.append(number)
            self.deltas.append(size)
        if category is not None:
            self.categories[known[0]] = category
        return known[0]

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
        return Timeline(np.array(self.storages), np.array(self.deltas), dict(self.categories), tuple(self.marks))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in COPIES:
            self.sources[self.watch(result)] = self.watch(args[0])
        for leaf in _pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.watch(leaf)
        return result
