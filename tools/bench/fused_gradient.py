"""A contender for the weight gradient on CUDA devices: dYᵀ z and its expansion by one Triton kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

ALONG = 1024  # columns of dW that are written at a time


@dataclass(frozen=True)
class Tiles:
    """How the work is cut: tiles of `out` x `groups` of dYᵀ z, whose rows are in `splits` parts, `rows` at a time."""

    out: int
    groups: int
    rows: int
    splits: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"{self.out}x{self.groups}x{self.rows}/{self.splits}"


# An H100 has 132 processors: O = 4096 and G = 128 (M = 32) are 32 tiles of 128 x 128, in four parts 128 programs.
CONTENDERS = (
    Tiles(128, 128, 64, 4, 8, 3),
    Tiles(64, 128, 64, 2, 4, 4),
    Tiles(128, 256, 64, 4, 8, 3),
    Tiles(128, 64, 64, 4, 4, 4),
    Tiles(128, 128, 64, 1, 8, 3),
    Tiles(64, 32, 128, 2, 4, 3),
)


def weight_gradient(dy: Tensor, z: Tensor, v: Tensor, tiles: Tiles) -> Tensor:
    """reshape((dYᵀ z) ⊗ v) of dY [N, O], z [N, G] and v [G, M]: [O, G * M] in dY's dtype, on a CUDA device.

    dY is read once for each tile of groups and dW written once. The parts of a tile are summed in float32, always in
    the same order, by whichever of its programs comes last, and rounded once.
    """
    (num_rows, out), (groups, size) = dy.shape, v.shape
    grid = (triton.cdiv(out, tiles.out), triton.cdiv(groups, tiles.groups), tiles.splits)
    parts = torch.empty(tiles.splits, grid[0] * tiles.out, grid[1] * tiles.groups, device=dy.device)
    arrived = torch.zeros(grid[0] * grid[1], dtype=torch.int32, device=dy.device)
    result = dy.new_empty(out, groups * size)
    _kernel[grid](
        dy, z, v.contiguous(), parts, arrived, result, num_rows, out, groups, dy.stride(0), z.stride(0),
        M=size, SPLITS=tiles.splits, BLOCK_O=tiles.out, BLOCK_G=tiles.groups, BLOCK_N=tiles.rows,
        ALONG=min(ALONG, triton.next_power_of_2(tiles.groups * size)),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return result


@triton.jit
def _kernel(
    dy, z, v, parts, arrived, result, num_rows, num_out, num_groups, dy_stride, z_stride,
    M: tl.constexpr, SPLITS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
    ALONG: tl.constexpr,
):  # fmt: skip
    first_out, first_group = tl.program_id(0) * BLOCK_O, tl.program_id(1) * BLOCK_G
    out, group = first_out + tl.arange(0, BLOCK_O), first_group + tl.arange(0, BLOCK_G)
    total = tl.zeros((BLOCK_O, BLOCK_G), tl.float32)
    for start in range(tl.program_id(2) * BLOCK_N, num_rows, SPLITS * BLOCK_N):
        row = (start + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        is_row = row < num_rows
        dy_tile = tl.load(dy + row * dy_stride + out[None, :], mask=is_row & (out < num_out)[None, :], other=0.0)
        z_tile = tl.load(z + row * z_stride + group[None, :], mask=is_row & (group < num_groups)[None, :], other=0.0)
        total = tl.dot(tl.trans(dy_tile), z_tile, total)
    # All parts of a tile go through memory, where they stay in the cache: dW is written in another order than that of
    # the product, along its rows.
    part_stride = tl.num_programs(1) * BLOCK_G
    part_size = tl.num_programs(0) * BLOCK_O * part_stride
    place = parts + tl.program_id(2) * part_size + out[:, None] * part_stride + group[None, :]
    tl.store(place, total)
    tl.debug_barrier()  # all threads have written before one says so
    tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    if tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLITS - 1:
        tl.debug_barrier()
        rows: tl.constexpr = 8
        width = num_groups * M
        end = tl.minimum((first_group + BLOCK_G) * M, width)
        for first_column in range(first_group * M, end, ALONG):
            column = first_column + tl.arange(0, ALONG)
            is_column = column < end
            direction = tl.load(v + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
            for first_row in range(first_out, tl.minimum(first_out + BLOCK_O, num_out), rows):
                row = first_row + tl.arange(0, rows)
                mask = (row < num_out)[:, None] & is_column[None, :]
                factor = parts + row[:, None] * part_stride + (column // M)[None, :]
                value = tl.zeros((rows, ALONG), tl.float32)
                for part in tl.static_range(SPLITS):
                    # Another program has written these: what is read must not come from this one's own cache.
                    value += tl.load(factor + part * part_size, mask=mask, other=0.0, cache_modifier=".cg")
                entry = result + row.to(tl.int64)[:, None] * width + column[None, :]
                tl.store(entry, (value * direction).to(result.dtype.element_ty), mask=mask)
