"""z[n, g] = <x[n, g*M:(g+1)*M], v[g]>, reading x once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # elements of x for each warp: 64 a thread, eight loads of 16 bytes in flight for 16-bit floats


def compress(x: Tensor, v: Tensor) -> Tensor:
    """Projections of the sub-tokens of x [..., D] on the rows of v [G, M], G * M = D, on a CUDA device.

    Returns z [..., G] in x's dtype, summed in float32 (float64 for float64). Rows of x may lie anywhere as long as the
    leading dimensions can be viewed as one; others, and rows that are not contiguous in themselves, are copied first.
    """
    groups, size = v.shape
    if x.numel() == 0:
        return x.new_zeros(*x.shape[:-1], groups)
    rows = x.reshape(-1, groups * size)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    z = x.new_empty(*x.shape[:-1], groups)
    block_size = triton.next_power_of_2(size)
    # Other sizes are summed across threads: within one warp, as several would do so through shared memory.
    num_warps = 4 if size == block_size or block_size > 256 else 1
    block_groups = min(triton.next_power_of_2(groups), max(1, num_warps * 256 // block_size))
    block_rows = min(triton.next_power_of_2(rows.shape[0]), max(1, num_warps * TILE // (block_groups * block_size)))
    grid = (triton.cdiv(rows.shape[0], block_rows), triton.cdiv(groups, block_groups))
    _compress_kernel[grid](
        rows, v.contiguous(), z, rows.shape[0], groups, rows.stride(0),
        M=size, BLOCK_N=block_rows, BLOCK_G=block_groups, BLOCK_M=block_size,
        ACCUMULATOR=tl.float64 if torch.float64 in (x.dtype, v.dtype) else tl.float32,
        num_warps=num_warps,
    )  # fmt: skip
    return z


def compress_naive(x: Tensor, v: Tensor) -> Tensor:
    """`compress` in float64, one operation after the other."""
    return (x.double().view(*x.shape[:-1], *v.shape) * v.double()).sum(-1).to(x.dtype)


@triton.jit
def _compress_kernel(
    x, v, z, num_rows, num_groups, row_stride,
    M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    # Sizes that are powers of two leave no gap between sub-tokens: the tile is read as one stretch of each row.
    row = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    first = tl.program_id(1) * BLOCK_G
    position = tl.arange(0, BLOCK_G * BLOCK_M)
    if BLOCK_M == M:
        column = first * M + position
        is_inside = column < num_groups * M
    else:
        column = (first + position // BLOCK_M) * M + position % BLOCK_M
        is_inside = (position % BLOCK_M < M) & (first + position // BLOCK_M < num_groups)
    # The same columns of v serve all rows of the tile.
    direction = tl.load(v + column, mask=is_inside, other=0.0).to(ACCUMULATOR)
    mask = (row < num_rows) & is_inside[None, :]
    values = tl.load(x + row * row_stride + column[None, :], mask=mask, other=0.0).to(ACCUMULATOR)
    products = tl.reshape(values * direction[None, :], (BLOCK_N, BLOCK_G, BLOCK_M))
    group = first + tl.arange(0, BLOCK_G)[None, :]
    is_group = (row < num_rows) & (group < num_groups)
    tl.store(z + row * num_groups + group, tl.sum(products, 2).to(z.dtype.element_ty), mask=is_group)
