"""``velora::compress`` and ``velora::expand`` in plain ATen, whole and block by block."""

from collections.abc import Iterator
from itertools import islice
from math import prod

import torch
from torch import Tensor

from velora_fx.ops.checks import check_compress, check_expand

_BLOCK_BYTES = 2**19


def compress_reference(x: Tensor, v: Tensor) -> Tensor:
    """``compress`` in plain ATen: what compilers see, and the kernel of every device that has no own one.

    Run eagerly it makes an [..., D] temporary of float32 or better.
    """
    check_compress(x, v)
    accumulator = torch.promote_types(x.dtype, torch.float32)
    v = v if v.dtype == accumulator else v.to(accumulator)  # else it is followed as a new tensor
    groups = x.view(*x.shape[:-1], *v.shape)
    return (groups.to(accumulator) * v).sum(-1).to(x.dtype)


def expand_reference(factor: Tensor, v: Tensor, transposed: bool) -> Tensor:
    """``expand`` in plain ATen, with no wider temporary of the result's size.

    Where v is more precise than the factor it is split in two, v = high + low: rounding v would scale whole columns of
    the gradient wrongly, while addcmul_ works in float32 inside and rounds once. The product with the low part is kept
    finite, so that infinity times v is infinity: it is never added to its opposite, nor multiplied by a low part of 0.
    """
    check_expand(factor, v)
    return expand_plain(factor, v, transposed)


def expand_plain(factor: Tensor, v: Tensor, transposed: bool) -> Tensor:
    """``expand_reference`` of operands that are right."""
    factor, v = (factor.t().unsqueeze(1), v.unsqueeze(-1)) if transposed else (factor.unsqueeze(-1), v)
    if v.dtype == factor.dtype or torch.promote_types(v.dtype, factor.dtype) == factor.dtype:
        product = factor * v
    else:
        high, largest = v.to(factor.dtype), torch.finfo(factor.dtype).max
        product = (factor.clamp(-largest, largest) * (v - high).to(factor.dtype)).addcmul_(factor, high)
    return product.flatten(0, 1).t() if transposed else product.flatten(1)


def compress_blocks(x: Tensor, v: Tensor, num_blocks: int | None) -> Tensor:
    """The kernel for CPUs, for the first blocks of rows only: the first takes as much memory as any other."""
    accumulator = x.dtype if x.itemsize >= 4 else torch.float32
    v = v if v.dtype == accumulator else v.to(accumulator)
    groups = x.view(*x.shape[:-1], *v.shape)
    if x.numel() * v.itemsize <= _BLOCK_BYTES:  # one block is all
        z = _sums(groups, v)
        return z if z.dtype == x.dtype else z.to(x.dtype)
    rows = max(1, _BLOCK_BYTES // v.nbytes)
    z = x.new_empty(*x.shape[:-1], v.shape[0])
    for x_block, z_block in islice(_row_blocks(groups, z, rows), num_blocks):
        z_block.copy_(_sums(x_block, v))
    return z


def _sums(x: Tensor, v: Tensor) -> Tensor:
    """The sums of x [..., G, M] times v [G, M] in v's dtype; where it is not x's, the cast made a copy to reuse."""
    return (x * v if x.dtype == v.dtype else x.to(v.dtype).mul_(v)).sum(-1)


def _row_blocks(x: Tensor, z: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of x [..., G, M] and z [..., G] of at most ``rows`` rows each; to flatten a strided x would copy it."""
    if x.dim() == 2:
        yield x, z
    elif (rows_inside := max(1, prod(x.shape[1:-2]))) <= rows:
        step = rows // rows_inside
        yield from zip(torch.split(x, step), torch.split(z, step), strict=True)
    else:
        for x_part, z_part in zip(x, z, strict=True):
            yield from _row_blocks(x_part, z_part, rows)
