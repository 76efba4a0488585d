"""dW[o, g*M + m] = factor[o, g] * v[g, m], written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 8192  # elements of dW a program writes


def expand(factor: Tensor, v: Tensor, transposed: bool) -> Tensor:
    """reshape(factor ⊗ v) of factor [O, G] and v [G, M], [O, G * M] in factor's dtype, on a CUDA device.

    Products are made in float32 (float64 for float64) and rounded once. With `transposed` the result has the memory
    layout of a transposed matrix, as the gradient of a transposed weight needs it.
    """
    (out, groups), size = factor.shape, v.shape[1]
    width = groups * size
    result = factor.new_empty(width, out).t() if transposed else factor.new_empty(out, width)
    if result.numel() == 0:
        return result
    # The long side of the tile runs along memory.
    along, across = (out, width) if transposed else (width, out)
    block_along = min(triton.next_power_of_2(along), 1024)
    block_across = min(triton.next_power_of_2(across), TILE // block_along)
    grid = (triton.cdiv(across, block_across), triton.cdiv(along, block_along))
    _expand_kernel[grid](
        factor, v.contiguous(), result, out, width, factor.stride(0), factor.stride(1),
        M=size, TRANSPOSED=transposed, BLOCK_ACROSS=block_across, BLOCK_ALONG=block_along,
        ACCUMULATOR=tl.float64 if torch.float64 in (factor.dtype, v.dtype) else tl.float32,
        num_warps=4,
    )  # fmt: skip
    return result


def expand_naive(factor: Tensor, v: Tensor, transposed: bool) -> Tensor:
    """`expand` in float64, one operation after the other."""
    result = (factor.double().unsqueeze(-1) * v.double()).flatten(1).to(factor.dtype)
    return result.t().contiguous().t() if transposed else result


@triton.jit
def _expand_kernel(
    factor, v, result, num_out, width, out_stride, group_stride,
    M: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_ACROSS: tl.constexpr, BLOCK_ALONG: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    across = (tl.program_id(0) * BLOCK_ACROSS + tl.arange(0, BLOCK_ACROSS))[:, None]
    along = (tl.program_id(1) * BLOCK_ALONG + tl.arange(0, BLOCK_ALONG))[None, :]
    if TRANSPOSED:
        row, column, place = along, across, across.to(tl.int64) * num_out + along
    else:
        row, column, place = across, along, across.to(tl.int64) * width + along
    direction = tl.load(v + column, mask=column < width, other=0.0).to(ACCUMULATOR)
    mask = (row < num_out) & (column < width)
    scale = tl.load(factor + row.to(tl.int64) * out_stride + (column // M) * group_stride, mask=mask, other=0.0).to(
        ACCUMULATOR
    )
    tl.store(result + place, (scale * direction).to(result.dtype.element_ty), mask=mask)
