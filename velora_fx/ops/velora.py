"""The operators of VeLoRA: ``velora::compress``, ``velora::linear`` and, for its backward pass, ``velora::expand``
(arXiv 2405.17991, section 3).

Letters in shapes: D input features = G sub-tokens of size M, O output features, N rows (the product of all leading
dimensions), dY the gradient of the output. For ``y = x Wᵀ`` only ``dW = dYᵀ x`` needs x. The paper keeps the
projections ``z[n, g] = <x[n, g, :], v>`` and rebuilds ``x̂ = z ⊗ v`` in the backward pass. Here x̂ never exists: v does
not depend on the row n, so ``dYᵀ x̂ = (dYᵀ z) ⊗ v``, the same number with 1/M of the work.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from velora_fx.ops.checks import check_compress, check_expand, check_linear
from velora_fx.ops.plain import compress_blocks, compress_reference, expand_plain, expand_reference

_PLAIN = (Tensor, Parameter, type(None))


__all__ = ["FUNCTIONS", "compress", "compress_reference", "expand", "expand_reference", "is_followed", "linear"]


def compress(x: Tensor, v: Tensor) -> Tensor:
    """Projects every sub-token of x on its row of v: z[..., g] = <x[..., g*M:(g+1)*M], v[g]> (section 3.1).

    x [..., D] and v [G, M], G * M = D, on one device, of float64, float32, bfloat16 or float16 each; returns z [..., G]
    in x's dtype, summed in float32 or better. Not differentiable: z never requires a gradient. ValueError otherwise.
    """
    if is_followed(x, v):
        z: Tensor = torch.ops.velora.compress.default(x, v)
        return z
    check_compress(x, v)
    return _compress(x, v)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, v: Tensor, carrier: Tensor | None) -> Tensor:
    """``torch.nn.functional.linear(x, weight, bias)``, bit for bit, whose weight gradient is taken from z and v.

    x [..., D], weight [O, D], bias [O], z [..., G], v [G, M], carrier [O, G]; returns [..., O]. Gradients:
    dx = dY W and dbias = Σ dY, both exact; dcarrier = dYᵀ z; dweight = reshape(dcarrier ⊗ v) (section 3.1 in closed
    form). The carrier has no part in the forward pass: its gradient is the weight's, M times smaller. Saves the weight
    if x wants a gradient, z if weight or carrier does, v if the weight does, and never x. ValueError for other shapes,
    dtypes than those of `compress`, or several devices; NotImplementedError for derivatives in forward mode.
    """
    if is_followed(x, weight, bias, z, v, carrier):
        y: Tensor = torch.ops.velora.linear.default(x, weight, bias, z, v, carrier)
        return y
    check_linear(x, weight, bias, z, v, carrier)
    return _linear(x, weight, bias, z, v, carrier)


def expand(factor: Tensor, v: Tensor, transposed: bool) -> Tensor:
    """reshape(factor ⊗ v): the weight's gradient of its factor dYᵀ z, in one pass over its memory.

    factor [O, G] and v [G, M]; returns [O, G * M] in factor's dtype, multiplied in float32 or better and rounded once.
    With `transposed` it has the strides of a transposed matrix, as a transposed weight's gradient needs them. Not
    differentiable. ValueError for other shapes, dtypes than those of `compress`, or several devices.
    """
    check_expand(factor, v)
    return _expand(factor, v, transposed)


def is_followed(*tensors: Tensor | None) -> bool:
    """True where a call has to be the operator: where a compiler, a mode, a subclass or a transform looks at it.

    Elsewhere the same code runs without PyTorch's wrapper around operators from Python, which costs 0.3 ms a call.
    """
    if torch.compiler.is_compiling():
        return True
    if torch._C._len_torch_dispatch_stack() or torch._C._is_tracing():
        return True
    if _len_torch_dispatch_stack_pre_dispatch():  # type: ignore[no-untyped-call]
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return True
    for tensor in tensors:
        if type(tensor) not in _PLAIN or not (tensor is None or tensor.is_cpu or tensor.is_cuda):
            return True
    return False


def _compress(x: Tensor, v: Tensor) -> Tensor:
    """`compress` where nothing follows operands that are right."""
    with torch._C._AutoDispatchBelowAutograd():
        return _compress_cuda(x, v) if x.is_cuda else compress_blocks(x, v, None)


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, v: Tensor, carrier: Tensor | None
) -> Tensor:
    """`linear` where nothing follows operands that are right; without z it makes its own."""
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        z = _compress(x, v) if z is None else z
        x, weight, bias = _cast_for(x.device.type, x, weight, bias)
    return _apply(x, weight, bias, z, v, carrier)


def _expand(factor: Tensor, v: Tensor, transposed: bool) -> Tensor:
    """`expand` of operands that are right."""
    if torch.is_grad_enabled() or is_followed(factor, v):
        dweight: Tensor = torch.ops.velora.expand.default(factor, v, transposed)
        return dweight
    return _expand_cuda(factor, v, transposed) if factor.is_cuda else expand_plain(factor, v, transposed)


def _linear_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, v: Tensor, carrier: Tensor | None
) -> Tensor:
    check_linear(x, weight, bias, z, v, carrier)
    y = F.linear(x, weight, bias)
    result: Tensor = torch.ops.aten._unsafe_view.default(y, y.shape)  # no view, which could not be written in place
    return result


_COMPRESS = torch.library.custom_op("velora::compress", compress_reference, mutates_args=())
_LINEAR = torch.library.custom_op("velora::linear", _linear_forward, mutates_args=())
_EXPAND = torch.library.custom_op("velora::expand", expand_reference, mutates_args=())


@_COMPRESS.register_kernel("cpu")
def _compress_cpu(x: Tensor, v: Tensor) -> Tensor:
    """``compress_reference`` block by block, so that its temporaries stay in the processor's cache."""
    check_compress(x, v)
    return compress_blocks(x, v, None)


@_COMPRESS.register_kernel("cuda")
def _compress_cuda(x: Tensor, v: Tensor) -> Tensor:
    """One Triton kernel; where there is no Triton (CUDA on Windows), block by block."""
    check_compress(x, v)
    if find_spec("triton") is None:
        return compress_blocks(x, v, None)
    from velora_fx.ops.kernels import compress as kernel

    with torch.cuda.device(x.device):  # Triton launches on the current one
        return kernel.compress(x, v)


@_EXPAND.register_kernel("cuda")
def _expand_cuda(factor: Tensor, v: Tensor, transposed: bool) -> Tensor:
    if find_spec("triton") is None:
        return expand_reference(factor, v, transposed)
    from velora_fx.ops.kernels import expand as kernel

    check_expand(factor, v)
    with torch.cuda.device(factor.device):
        return kernel.expand(factor, v, transposed)


@_COMPRESS.register_fake
def _compress_fake(x: Tensor, v: Tensor) -> Tensor:
    check_compress(x, v)
    return x.new_empty(*x.shape[:-1], v.shape[0])


@_LINEAR.register_fake
def _linear_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, v: Tensor, carrier: Tensor | None
) -> Tensor:
    check_linear(x, weight, bias, z, v, carrier)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@_EXPAND.register_fake
def _expand_fake(factor: Tensor, v: Tensor, transposed: bool) -> Tensor:
    check_expand(factor, v)
    out, width = factor.shape[0], v.shape[0] * v.shape[1]
    return factor.new_empty(width, out).t() if transposed else factor.new_empty(out, width)


class _Linear(torch.autograd.Function):
    """``velora::linear`` where nothing follows it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, v: Tensor, carrier: Tensor | None
    ) -> Tensor:
        if z is None:
            with torch._C._AutoDispatchBelowADInplaceOrView():
                z = _compress_cuda(x, v) if x.is_cuda else compress_blocks(x, v, None)
        _linear_setup(ctx, (x, weight, bias, z, v, carrier), x)
        y = F.linear(x, weight, bias)
        # A view could not be written in place: what it is a view of, which nothing else knows, takes its shape.
        return y if y._base is None else y._base.resize_(y.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _linear_backward(ctx, dy)


# What `_Linear.apply` calls once it has made sure of what `is_followed` tells.
_apply: Callable[..., Tensor] = super(torch.autograd.Function, _Linear).apply


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, _, z, v, _ = inputs
    needs_x, needs_weight, _, _, _, needs_carrier = ctx.needs_input_grad[:6]
    saved_z = z if needs_weight or needs_carrier else None
    ctx.is_transposed = not weight.is_contiguous() and weight.t().is_contiguous()  # as Conv1D's is: so its gradient
    ctx.save_for_backward(weight if needs_x else None, saved_z, v if needs_weight else None)


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    weight, z, v = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, _, _, needs_carrier = ctx.needs_input_grad
    *lead, out = dy.shape
    num_rows = prod(lead)  # -1 would be ambiguous where a size is 0
    rows = dy.reshape(num_rows, out)
    dx = dweight = dbias = dcarrier = None
    if needs_x:
        dx = (rows @ weight).view(*lead, weight.shape[1])
    if needs_bias:
        dbias = rows.sum(0)
    if needs_weight or needs_carrier:
        # Under autocast dY is in low precision and z is not.
        z = z if z.dtype == dy.dtype else z.to(dy.dtype)
        factor = rows.t() @ z.reshape(num_rows, z.shape[-1])
        dweight = _expand(factor, v, ctx.is_transposed) if needs_weight else None
        dcarrier = factor if needs_carrier else None
    return dx, dweight, dbias, None, None, dcarrier


def _decomposed_into(plain: Callable[..., Tensor]) -> Callable[..., Any]:
    """The rule by which AOTAutograd traces ``plain`` in place of its operator, below autograd.

    An entry in Inductor's decomposition table would do the same for Inductor alone, would cost 0.8 s of import, and is
    lost when a model was compiled before this module was imported: Inductor copies its table once.
    """

    def rule(mode: Any, op: Any, types: tuple[type, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not all(issubclass(t, (FunctionalTensor, FakeTensor)) or t is Tensor for t in types):
            return NotImplemented  # a subclass unwraps itself first
        with mode:
            return plain(*args, **kwargs)

    return rule


def _autocast(device_type: str, key: torch._C.DispatchKey) -> Callable[..., Tensor]:
    def kernel(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, v: Tensor, carrier: Tensor | None) -> Tensor:
        x, weight, bias = _cast_for(device_type, x, weight, bias)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            y: Tensor = torch.ops.velora.linear.default(x, weight, bias, z, v, carrier)
            return y

    return kernel


def _cast_for(device_type: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast has a linear take; z, v and the carrier stay as they are."""
    dtype = torch.get_autocast_dtype(device_type)
    return _autocast_to(dtype, x), _autocast_to(dtype, weight), bias if bias is None else _autocast_to(dtype, bias)


def _autocast_to(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    # As aten::linear has it: float64 is left alone.
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


_COMPRESS.register_autograd(
    lambda ctx, dz: (None, None), setup_context=lambda ctx, inputs, output: ctx.mark_non_differentiable(output)
)
_LINEAR.register_autograd(_linear_backward, setup_context=_linear_setup)
_COMPRESS.register_torch_dispatch(FunctionalTensorMode, _decomposed_into(compress_reference))
_LINEAR.register_torch_dispatch(FunctionalTensorMode, _decomposed_into(_linear_forward))
_EXPAND.register_torch_dispatch(FunctionalTensorMode, _decomposed_into(expand_reference))
register_flop_formula(torch.ops.velora.compress)(lambda x, *_, **__: 2 * prod(x))
register_flop_formula(torch.ops.velora.linear)(lambda x, weight, *_, **__: 2 * prod(x) * weight[0])
# custom_op's own register_autocast would fix one dtype here and now, and would cast z, v and the carrier too.
_AUTOCAST = torch.library.Library("velora", "FRAGMENT")  # type: ignore[no-untyped-call]
_AUTOCAST.impl("linear", _autocast("cpu", torch._C.DispatchKey.AutocastCPU), "AutocastCPU")  # type: ignore[no-untyped-call]
_AUTOCAST.impl("linear", _autocast("cuda", torch._C.DispatchKey.AutocastCUDA), "AutocastCUDA")  # type: ignore[no-untyped-call]

FUNCTIONS: Mapping[Any, Callable[..., Tensor]] = {
    torch.ops.velora.compress.default: _compress,
    torch.ops.velora.linear.default: _linear,
}  # what runs in their place where nothing follows operands that are right, as those of a region's graph are
