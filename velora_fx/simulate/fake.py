"""A copy of a model that holds no memory, to run a training step of it without computing anything."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from velora_fx.capture import own_attributes
from velora_fx.simulate.rebound_functions import rebind_functions

Value = TypeVar("Value")
Real = Literal["none", "integers", "all"]


def fake_mode() -> FakeTensorMode:
    """A mode that is never entered: only what derives from fake weights and inputs is fake.

    Integer inputs, masks and positions stay real and are computed, so that a branch on their values (is there any
    padding?) goes the way of a real run.
    """
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_tensor(
    tensor: torch.Tensor, mode: FakeTensorMode, device: torch.device | None = None, real: Real = "integers"
) -> torch.Tensor:
    """A tensor without memory of the same shape, strides, dtype and class, on `device` (default: its own).

    Tensors of integers are real copies, all that require no gradient where `real` is "all", and none where "none";
    parameters never are, of integers (quantised ones) neither. Their attributes are shared.
    """
    where = device or tensor.device
    if where.type == "meta" or (where.type == "cuda" and not torch.cuda.is_available()):
        where = torch.device("cpu")
    if isinstance(tensor, torch.nn.Parameter):
        with mode:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=where)
        parameter = torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
        parameter.__dict__.update(own_attributes(tensor))
        return parameter
    is_real = real != "none" and not (isinstance(tensor, FakeTensor) or tensor.is_meta)
    if is_real and (
        (real == "all" and not tensor.requires_grad) or not (tensor.is_floating_point() or tensor.is_complex())
    ):
        return tensor.detach().to(where, copy=True)
    with mode:  # a view holds all of its storage
        whole = torch.empty(tensor.untyped_storage().nbytes() // tensor.itemsize, dtype=tensor.dtype, device=where)
        fake = whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return fake.requires_grad_(tensor.requires_grad)


def fake_copy(
    value: Value,
    mode: FakeTensorMode,
    device: torch.device | None = None,
    real: Real = "integers",
    stand_ins: Mapping[int, torch.nn.Module] | None = None,
) -> Value:
    """Deep copy of a module, or of nested call arguments, with `fake_tensor` of every tensor; ties stay ties.

    `stand_ins` has what takes the place of modules, by their ids. Functions that are attributes of a module call the
    copies of the modules that they call. Raises ValueError for what Python cannot copy.
    """
    memo: dict[int, Any] = {**(stand_ins or {})}
    kept: list[torch.Tensor] = []
    for tensor in _tensors(value, stand_ins or {}):
        if id(tensor) not in memo:
            memo[id(tensor)] = fake_tensor(tensor, mode, device, real)
            kept.append(tensor)
    try:
        copied = copy.deepcopy(value, memo)
        if isinstance(value, torch.nn.Module):
            rebind_functions(value, memo)
        return copied
    except Exception as error:
        raise ValueError(
            f"planning works on a copy of the model and its inputs, and they cannot be copied: {error}"
        ) from error


def _tensors(value: Any, left_out: Collection[int]) -> Iterator[torch.Tensor]:
    """The tensors in nested containers or, but for the modules that are left out, in a module."""
    if isinstance(value, torch.nn.Module):
        for module in _modules(value, left_out, set()):
            for attribute in vars(module).values():
                yield from _tensors_inside(attribute)
    else:
        yield from _tensors_inside(value)


def _modules(module: torch.nn.Module, left_out: Collection[int], seen: set[int]) -> Iterator[torch.nn.Module]:
    if id(module) not in left_out and id(module) not in seen:
        seen.add(id(module))
        yield module
        for child in module.children():
            yield from _modules(child, left_out, seen)


def _tensors_inside(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list, set, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_inside(item)


@contextlib.contextmanager
def as_compiled() -> Iterator[None]:
    """The context in which a forward takes the way that it takes when torch.compile traces it."""
    flags = torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag
    torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag = True, False
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag = flags
