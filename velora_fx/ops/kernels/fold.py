"""weight[o, g*M + m] = keep * weight[o, g*M + m] + carrier[o, g] * sign(v[g, m]), in place, many weights at once."""

from collections.abc import Sequence
from itertools import groupby

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements of a weight that a program changes
TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def fold(weights: Sequence[Tensor], carriers: Sequence[Tensor], vs: Sequence[Tensor], keep: Tensor) -> None:
    """Scales weights [O, G * M] by `keep` and adds carriers [O, G] times the signs of their v [G, M], on one device.

    Sums are made in float32 (float64 for float64) and rounded once. Weights of one shape, dtype and layout are changed
    by one launch; one of the two strides of each is 1, as in a matrix and in its transpose.
    """
    together = sorted(zip(weights, carriers, vs, strict=True), key=_kind)
    if keep.device != weights[0].device:  # a copy from the CPU would wait for the device
        keep = torch.full((), float(keep), dtype=torch.float64, device=weights[0].device)
    keep = keep.double()
    for _, group in groupby(together, _kind):
        _launch(list(group), keep)


def fold_naive(weights: Sequence[Tensor], carriers: Sequence[Tensor], vs: Sequence[Tensor], keep: Tensor) -> None:
    """`fold` in float64, one operation after the other."""
    for weight, carrier, v in zip(weights, carriers, vs, strict=True):
        update = (carrier.double().unsqueeze(-1) * v.double().sign()).flatten(1)
        weight.copy_(weight.double() * keep.double() + update)


def _kind(item: tuple[Tensor, Tensor, Tensor]) -> tuple[object, ...]:
    weight, carrier, v = item
    return tuple(weight.shape), weight.stride(), tuple(v.shape), carrier.stride(), str((weight.dtype, carrier.dtype))


def _launch(group: Sequence[tuple[Tensor, Tensor, Tensor]], keep: Tensor) -> None:
    weight, carrier, v = group[0]
    if weight.numel() == 0:
        return
    directions = torch.stack([direction.flatten() for _, _, direction in group])
    addresses = torch.tensor([[w.data_ptr(), c.data_ptr()] for w, c, _ in group], dtype=torch.int64)
    out, width = weight.shape
    # The long side of the tile runs along memory.
    is_transposed = weight.stride(1) != 1
    along, across = (out, width) if is_transposed else (width, out)
    block_along = min(triton.next_power_of_2(along), 1024)
    block_across = min(triton.next_power_of_2(across), TILE // block_along)
    grid = (triton.cdiv(across, block_across), triton.cdiv(along, block_along), len(group))
    _fold_kernel[grid](
        addresses.to(weight.device, non_blocking=True), directions, keep, out, width,
        weight.stride(0) if not is_transposed else weight.stride(1), carrier.stride(0), carrier.stride(1),
        M=v.shape[1], TRANSPOSED=is_transposed, BLOCK_ACROSS=block_across, BLOCK_ALONG=block_along,
        WEIGHT=TYPES[weight.dtype], CARRIER=TYPES[carrier.dtype],
        ACCUMULATOR=tl.float64 if weight.dtype == torch.float64 else tl.float32,
        ALIGNED=all(w.data_ptr() % 16 == 0 for w, _, _ in group), num_warps=4,
    )  # fmt: skip


@triton.jit
def _fold_kernel(
    addresses, directions, keep, num_out, width, stride, out_stride, group_stride,
    M: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_ACROSS: tl.constexpr, BLOCK_ALONG: tl.constexpr,
    WEIGHT: tl.constexpr, CARRIER: tl.constexpr, ACCUMULATOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(2).to(tl.int64)
    weight = tl.load(addresses + 2 * number).to(tl.pointer_type(WEIGHT))
    carrier = tl.load(addresses + 2 * number + 1).to(tl.pointer_type(CARRIER))
    if ALIGNED:
        weight = tl.multiple_of(weight, 16)
    across = (tl.program_id(0) * BLOCK_ACROSS + tl.arange(0, BLOCK_ACROSS))[:, None]
    along = (tl.program_id(1) * BLOCK_ALONG + tl.arange(0, BLOCK_ALONG))[None, :]
    if TRANSPOSED:
        row, column = along, across
    else:
        row, column = across, along
    place = weight + across.to(tl.int64) * stride + along
    mask = (row < num_out) & (column < width)
    direction = tl.load(directions + number * width + column, mask=column < width, other=0.0)
    step = tl.load(
        carrier + row.to(tl.int64) * out_stride + (column // M).to(tl.int64) * group_stride, mask=mask, other=0.0
    ).to(ACCUMULATOR)
    old = tl.load(place, mask=mask, other=0.0).to(ACCUMULATOR)
    new = old * tl.load(keep).to(ACCUMULATOR) + tl.where(direction < 0, -step, step)
    tl.store(place, new.to(WEIGHT), mask=mask)
