"""What the operators of VeLoRA may be given."""

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch.autograd import forward_ad

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_OPERANDS = ("weight", "bias", "z", "carrier")


def check_compress(x: Tensor, v: Tensor) -> None:
    """ValueError unless x is [..., D] and v [G, M] with G * M = D, of `DTYPES` and on one device."""
    _check_widths(x, v)
    _check_alike("compress", x=x, v=v)


def check_expand(factor: Tensor, v: Tensor) -> None:
    """ValueError unless the factor is [O, G] and v [G, M], of `DTYPES` and on one device."""
    if factor.dim() != 2 or v.dim() != 2 or factor.shape[1] != v.shape[0]:
        raise ValueError(
            f"velora::expand: got factor {[*factor.shape]} and v {[*v.shape]}; allowed: factor [O, G] and v [G, M]"
        )
    _check_alike("expand", factor=factor, v=v)


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, v: Tensor, carrier: Tensor | None) -> None:
    """ValueError unless the shapes are those that `linear` tells, all of `DTYPES` and on one device.

    NotImplementedError for derivatives in forward mode.
    """
    _check_widths(x, v)
    features, out, groups = x.shape[-1:], weight.shape[:1], v.shape[:1]
    shapes = out + features, out, x.shape[:-1] + groups, out + groups
    for name, tensor, shape in zip(_OPERANDS, (weight, bias, z, carrier), shapes, strict=True):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"velora::linear: got {name} {[*tensor.shape]}; allowed: {[*shape]}, "
                f"for x {[*x.shape]}, weight {[*weight.shape]} and v {[*v.shape]}"
            )
    _check_alike("linear", x=x, weight=weight, bias=bias, z=z, v=v, carrier=carrier)
    _check_mode(x, weight, bias, carrier)


def _check_widths(x: Tensor, v: Tensor) -> None:
    if x.dim() < 1 or v.dim() != 2 or x.shape[-1] != v.shape[0] * v.shape[1]:
        raise ValueError(
            f"velora::compress: got x {[*x.shape]} and v {[*v.shape]}; allowed: x [..., D] and v [G, M] with G * M = D"
        )


def _check_alike(operator: str, **tensors: Tensor | None) -> None:
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors.values() if tensor is not None}
    if len(kinds) == 1 and next(iter(kinds))[0] in DTYPES:
        return
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if any([tensor.dtype not in DTYPES for tensor in given.values()]):
        got = ", ".join(f"{name} of {tensor.dtype}" for name, tensor in given.items())
        raise ValueError(f"velora::{operator}: got {got}; allowed: {', '.join(map(str, DTYPES))}")
    if len({tensor.device for tensor in given.values()}) > 1:
        got = ", ".join(f"{name} on {tensor.device}" for name, tensor in given.items())
        raise ValueError(f"velora::{operator}: got {got}; allowed: all on one device")


def _check_mode(*tensors: Tensor | None) -> None:
    """Refuses forward mode: operators from Python know nothing of tangents, and would give zero in silence."""
    if forward_ad._current_level < 0:
        return
    duals = [forward_ad.unpack_dual(tensor) for tensor in tensors if tensor is not None]  # type: ignore[no-untyped-call]
    # What torch.func wraps is unwrapped by now: there a tangent cannot be seen.
    if eager_transforms.JVP_NESTING or any(dual.tangent is not None for dual in duals):
        raise NotImplementedError(
            "velora::linear has no forward-mode derivative: take derivatives in reverse mode, or of the dense linear"
        )
