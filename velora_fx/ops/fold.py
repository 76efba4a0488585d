"""The operator ``velora::fold``: the update of a factored gradient, spread over its weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

_BLOCK_BYTES = 2**19


def fold(weights: Sequence[Tensor], carriers: Sequence[Tensor], vs: Sequence[Tensor], keep: Tensor) -> None:
    """weight = keep * weight + reshape(carrier ⊗ sign(v)), in place; the carriers are zero afterwards.

    Each weight [O, G * M] with its carrier [O, G] and its v [G, M], of any floating dtypes and strides, all on one
    device; `keep` has one entry, on that device or the CPU. An elementwise optimizer that treats both signs alike and
    steps the carrier from zero with the gradient |v| dYᵀz steps the weight so with dYᵀz ⊗ v. ValueError for other
    shapes.
    """
    torch.ops.velora.fold.default(list(weights), list(carriers), list(vs), keep)


def fold_reference(weights: Sequence[Tensor], carriers: Sequence[Tensor], vs: Sequence[Tensor], keep: Tensor) -> None:
    """``fold`` in plain ATen: block by block, so that a block is in the processor's cache when it is added to."""
    _check(weights, carriers, vs, keep)
    is_kept = keep.device.type == "cpu" and float(keep) == 1.0
    for weight, carrier, v in zip(weights, carriers, vs, strict=True):
        for block, step, signs in _blocks(weight, carrier, v.sign().to(weight.dtype)):
            if not is_kept:
                block.mul_(keep)
            block.addcmul_(step, signs)
        carrier.zero_()


def _blocks(weight: Tensor, carrier: Tensor, signs: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Views of a weight, its carrier and its signs that can be broadcast together, one after the other in memory."""
    if weight.stride(0) >= weight.stride(1):
        views = (
            weight.view(weight.shape[0], *signs.shape),
            carrier.unsqueeze(-1),
            signs.expand(weight.shape[0], *signs.shape),
        )
    else:
        views = weight.t().view(*signs.shape, weight.shape[0]), carrier.t().unsqueeze(1), signs.unsqueeze(-1)
    row_bytes = weight.nbytes // max(1, views[0].shape[0])
    size = max(1, _BLOCK_BYTES // max(1, row_bytes))
    yield from zip(*(torch.split(view, size) for view in views), strict=True)


_FOLD = torch.library.custom_op("velora::fold", fold_reference, mutates_args=("weights", "carriers"))


@_FOLD.register_kernel("cuda")
def _fold_cuda(weights: Sequence[Tensor], carriers: Sequence[Tensor], vs: Sequence[Tensor], keep: Tensor) -> None:
    """One Triton kernel for weights that are alike; where there is no Triton (CUDA on Windows), block by block."""
    if find_spec("triton") is None or not all(1 in weight.stride() for weight in weights):
        return fold_reference(weights, carriers, vs, keep)
    from velora_fx.ops.kernels import fold as kernel

    _check(weights, carriers, vs, keep)
    with torch.cuda.device(weights[0].device):  # Triton launches on the current one
        kernel.fold(weights, carriers, vs, keep)
    torch._foreach_zero_(list(carriers))


@_FOLD.register_fake
def _check(weights: Sequence[Tensor], carriers: Sequence[Tensor], vs: Sequence[Tensor], keep: Tensor) -> None:
    if not len(weights) == len(carriers) == len(vs) or keep.numel() != 1:
        raise ValueError(
            f"velora::fold: got {len(weights)} weights, {len(carriers)} carriers, {len(vs)} projections and keep "
            f"{[*keep.shape]}; allowed: as many of each, and a keep of one entry"
        )
    for weight, carrier, v in zip(weights, carriers, vs, strict=True):
        fits = v.dim() == 2 and weight.dim() == 2 and weight.shape[1] == v.numel()
        if not fits or carrier.shape != (weight.shape[0], v.shape[0]):
            raise ValueError(
                f"velora::fold: got weight {[*weight.shape]}, carrier {[*carrier.shape]} and v {[*v.shape]}; "
                "allowed: weight [O, G * M], carrier [O, G] and v [G, M]"
            )
