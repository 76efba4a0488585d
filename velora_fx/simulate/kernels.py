"""What the kernels of a device do that the shape functions of their operators do not tell."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from velora_fx.ops import compress_blocks
from velora_fx.simulate.cpu_kernels import CONVOLUTIONS, LARGER, as_on_cpu, take_copies
from velora_fx.simulate.observer import Observer

aten = torch.ops.aten
DEVICE = torch.ops.prim.device.default
COMPRESS, LINEAR = torch.ops.velora.compress.default, torch.ops.velora.linear.default
GROUPED, CTC = aten._grouped_mm.default, aten._ctc_loss.Tensor
ARITHMETIC = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
INDEXING = (
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
    aten._unsafe_index.Tensor, aten._unsafe_index_put.default,
)  # fmt: skip
PADS = (aten.slice_backward.default, aten.select_backward.default)
LAYER_NORMS = (aten.native_layer_norm.default, aten.native_layer_norm_backward.default)
ON_ANY_DEVICE = (GROUPED, CTC, *INDEXING, LINEAR, FLASH_BACKWARD, *LAYER_NORMS, *PADS, aten.view.default)
ON_CPU = (COMPRESS, *ARITHMETIC, *CONVOLUTIONS, *LARGER)


class RealKernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets fake operators do what the real kernels of a device do and their shape functions do not.

    `aten._grouped_mm` (mixtures of experts) takes all dtypes, `aten._ctc_loss` real lengths of texts; layer norms and
    their gradients are made from contiguous copies and are contiguous; real masks pick what they pick. On the CPU
    `velora.compress` takes memory for its products, arithmetic on two dtypes first casts an operand, the backward of
    attention copies a gradient that is not laid out [batch, length, heads], convolutions copy what is not laid out as
    their weight, and some storages are larger than their tensors. The backward of a view that was written in place (a
    linear's output of three dimensions) copies the gradient.

    `observers` are shown each operator that runs: modes of their own would each cost as much as this one does.
    """

    supports_higher_order_operators = True

    def __init__(self, device: torch.device, observers: tuple[Observer, ...] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_cpu = device.type == "cpu"
        self.observers = observers
        self._differing = frozenset((*ON_ANY_DEVICE, *(ON_CPU if self.is_cpu else ())))
        self._padded: weakref.ref[torch.UntypedStorage] | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_fake = bool(args) and isinstance(args[0], FakeTensor)
        if func is DEVICE and is_fake and not args[0].fake_mode.in_kernel_invocation:
            return args[0].fake_device  # autograd asks for it more often than all other operators run
        # What backward calls is in sight of function modes, which would be asked of every attribute of a tensor here.
        with torch._C.DisableTorchFunction():
            if func not in self._differing or not is_fake:
                return self._run(func, types, args, kwargs)
            return self._run_differing(func, types, args, kwargs)

    def _run_differing(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self:  # what takes memory here is seen too
            made = _made_without_kernel(func, args, kwargs)
            if made is not None:
                return made
            args = self._operands(func, args)
            copied = self._copy_beside(func, args)
        result = self._run(func, types, args, kwargs)
        del copied
        with self:
            return self._result(func, args, result)

    def _run(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of the operator, seen by the observers.

        A fake tensor would enter its mode and call the operator again: where no other mode is to see that, to ask its
        mode at once takes a third less.
        """
        is_ours = isinstance(func, OpOverload) and all(issubclass(kind, FakeTensor) for kind in types)
        if is_ours and args and isinstance(args[0], FakeTensor) and not torch._C._len_torch_dispatch_stack():
            result = args[0].fake_mode.dispatch(func, types, args, kwargs)
        else:
            result = func(*args, **kwargs)
        for observer in self.observers:
            observer.observe(func, args, kwargs, result)
        return result

    def _operands(self, func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """What the kernel computes with."""
        if func in INDEXING:
            return (args[0], [part for index in args[1] for part in _as_numbers(index)], *args[2:])
        if func is FLASH_BACKWARD:
            return (args[0].transpose(1, 2).contiguous().transpose(1, 2), *args[1:])
        if func in LAYER_NORMS:
            return tuple(a.contiguous() if isinstance(a, FakeTensor) and a.dim() else a for a in args)
        if func in ARITHMETIC and self.is_cpu and all(isinstance(a, FakeTensor) and a.dim() for a in args):
            dtype = torch.promote_types(args[0].dtype, args[1].dtype)
            return tuple(a if a.dtype == dtype else a.to(dtype) for a in args)
        return args

    def _copy_beside(self, func: Any, args: tuple[Any, ...]) -> torch.Tensor | None:
        """What the kernel holds until it returns."""
        if func is COMPRESS and self.is_cpu:
            compress_blocks(args[0], args[1], 1)
        if func is LINEAR:  # as a linear copies rows that are not one after the other
            return args[0].reshape(-1, args[0].shape[-1])  # type: ignore[no-any-return]
        return None

    def _result(self, func: Any, args: tuple[Any, ...], result: Any) -> Any:
        """The result with the storages that the kernel gives it."""
        if func in PADS:
            self._padded = weakref.ref(result.untyped_storage())
        if func is aten.view.default and _is_backward_of_written_view():
            is_made = self._padded is not None and self._padded() is args[0].untyped_storage()  # for a part of the view
            return result if is_made else result.new_empty(result.shape)
        if not self.is_cpu:
            return result
        take_copies(func, args, result)
        return as_on_cpu(func, args, result)


def _made_without_kernel(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operator whose shape function would refuse, else None."""
    if func is GROUPED:
        a, b = args[:2]
        shape = [a.shape[-2], b.shape[-1]]
        if a.dim() == b.dim():  # a product for each group
            groups = a if a.dim() == 3 else args[2] if len(args) > 2 else kwargs["offs"]
            shape.insert(0, groups.shape[0])
        return a.new_empty(shape)
    if func is CTC and not any(isinstance(a, FakeTensor) for a in args[1:4]):
        steps, batch = args[0].shape[0], args[3].numel()
        states = 2 * int(args[3].max()) + 1  # of the longest text, whose length is real
        return args[0].new_empty(batch), args[0].new_empty(batch, steps, states)
    return None


def _as_numbers(index: Any) -> tuple[Any, ...]:
    """A real mask among the indices as the numbers of what it picks: how many these are its shape does not tell."""
    is_mask = isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
    return index.nonzero().unbind(1) if is_mask and not isinstance(index, FakeTensor) else (index,)


def _is_backward_of_written_view() -> bool:
    """True in the node that a view got when it was written in place.

    That of a real tensor is `AsStridedBackward0`, which makes a new gradient; fake ones, of a subclass, repeat views.
    """
    node = torch._C._current_autograd_node()
    if node is None or node.name() != "ViewBackward0":
        return False
    return any(after is not None and after.name() == "torch::autograd::CopySlices" for after, _ in node.next_functions)


class FusedAttention(TorchFunctionMode):
    """Attention as the one fused operator of a GPU, for planning without one: it saves q, k, v, out and logsumexp."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name.split(".")[0] == "scaled_dot_product_attention":
            return _fused_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16):
        flash: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
        return flash
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    out: torch.Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
    )[0]
    return out


@contextlib.contextmanager
def kernels_of(device: torch.device, *observers: Observer) -> Iterator[RealKernels]:
    """The context in which fake operators behave as the kernels of `device` do, each shown to the observers."""
    fused = device.type == "cuda" and not torch.cuda.is_available()
    with RealKernels(device, observers) as kernels, FusedAttention() if fused else contextlib.nullcontext():
        yield kernels
