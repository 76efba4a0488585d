"""The part of a weight that this rank holds, with what of its carrier and projection belongs to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


@dataclass(frozen=True)
class Shard:
    """A weight [O, G * M], its carrier [O, G] and its projection v [G, M], or the parts of them on this rank."""

    weight: torch.Tensor
    carrier: torch.Tensor
    v: torch.Tensor


def local_shard(weight: torch.Tensor, carrier: torch.Tensor, v: torch.Tensor, input_dim: int) -> Shard:
    """The tensors themselves or, of DTensors (FSDP2), the local ones; `input_dim` is the weight's G * M dimension.

    Raises RuntimeError where sub-tokens are split between ranks.
    """
    shards: tuple[Any, Any] = weight, carrier
    if is_traceable_wrapper_subclass(shards[0]):
        v = _own_rows(*shards, v, input_dim)
        weight, carrier = (shard.to_local() for shard in shards)
    return Shard(weight, carrier, v) if input_dim == 1 else Shard(weight.t(), carrier.t(), v)


def _own_rows(weight: Any, carrier: Any, v: torch.Tensor, input_dim: int) -> torch.Tensor:
    groups, size = v.shape
    first, count = _local_range(carrier, input_dim)
    is_aligned = _local_range(weight, input_dim) == (first * size, count * size)
    if not is_aligned or _local_range(weight, 1 - input_dim) != _local_range(carrier, 1 - input_dim):
        raise RuntimeError(
            f"velora_fx: a weight {[*weight.shape]} is sharded within its sub-tokens of {size}: shard over a number of "
            f"ranks that divides {groups}, or use gradients='dense'"
        )
    return v[first : first + count]


def _local_range(tensor: Any, dim: int) -> tuple[int, int]:
    """Where the local part begins along a dimension, and its size."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return int(offset[dim]), int(shape[dim])
