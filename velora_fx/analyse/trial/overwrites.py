"""What is written in place of that which recompute in backward would rely on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from velora_fx.runtime import COSTLY

OWN_NAMESPACES = ("aten", "prim", "prims", "velora")


class Overwrites(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees, while it is on, which regions have their inputs, or the results of COSTLY operators in them, written in
    place, by whomever and through whatever view. What the optimizer does to `parameters` does not count.

    A region whose inputs are written cannot run again from them: `inputs_of`. Where costly results are written,
    selective checkpointing, which keeps those, would go on from what was written: `results_of`.
    """

    supports_higher_order_operators = True

    def __init__(self, parameters: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inputs_of: set[str] = set()
        self.results_of: set[str] = set()
        self._parameters: MutableMapping[Any, None] = WeakIdKeyDictionary(
            {parameter.untyped_storage(): None for parameter in parameters}
        )
        self._inputs: MutableMapping[Any, set[str]] = WeakIdKeyDictionary()
        self._results: MutableMapping[Any, set[str]] = WeakIdKeyDictionary()
        self._region: str | None = None

    @contextlib.contextmanager
    def inside(self, region: str, inputs: Iterable[Any]) -> Iterator[None]:
        """The context in which a region runs on these inputs."""
        for tensor in inputs:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self._parameters:
                self._inputs.setdefault(tensor.untyped_storage(), set()).add(region)
        before, self._region = self._region, region
        try:
            with self:  # before modes that put other operators in the place of those that are called
                yield
        finally:
            self._region = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in _written(func, args, kwargs or {}):
            storage = tensor.untyped_storage()
            self.inputs_of |= self._inputs.get(storage, set())
            self.results_of |= self._results.get(storage, set())
        result = func(*args, **(kwargs or {}))
        if self._region is not None and _is_costly(func):
            for leaf in _pytree.tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self._results.setdefault(leaf.untyped_storage(), set()).add(self._region)
        return result


def _is_costly(func: Any) -> bool:
    """True for what selective checkpointing keeps, and for operators of other libraries.

    A graph may have one of these (a product of groups) where the forward that is recomputed takes PyTorch's.
    """
    return getattr(func, "overloadpacket", None) in COSTLY or getattr(func, "namespace", "aten") not in OWN_NAMESPACES


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The operands that an operator writes to, by its schema."""
    schema = getattr(func, "_schema", None)  # an operator of operators has none
    if schema is None or not schema.is_mutable:
        return []
    given = {**{a.name: value for a, value in zip(schema.arguments, args, strict=False)}, **kwargs}
    written = [given.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [leaf for leaf in _pytree.tree_leaves(written) if isinstance(leaf, torch.Tensor)]
