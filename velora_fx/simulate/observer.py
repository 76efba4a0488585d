"""What is shown the operators of a step, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Is shown each operator that has run, by `RealKernels`, or as a mode of its own while it is on."""

    supports_higher_order_operators = True

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Takes note of an operator and of what it returned."""
        raise NotImplementedError

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.observe(func, args, kwargs, result)
        return result


def tensors_among(value: Any) -> Iterator[torch.Tensor]:
    """The tensors that an operator is given or returns: alone, in lists and tuples, or by name."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_among(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_among(item)


def bytes_behind(tensor: torch.Tensor) -> int:
    """The bytes behind a tensor: an expanded one is no larger than its storage."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())
