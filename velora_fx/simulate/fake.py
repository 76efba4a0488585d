"""A copy of a model that holds no memory, to run a training step of it without computing anything."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from velora_fx.capture import own_attributes
from velora_fx.ops import compress_blocks
from velora_fx.simulate.cpu_kernels import as_on_cpu, take_copies
from velora_fx.simulate.rebound_functions import rebind_functions

Value = TypeVar("Value")
Real = Literal["none", "integers", "all"]
aten = torch.ops.aten
ARITHMETIC = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
INDEXING = (
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
    aten._unsafe_index.Tensor, aten._unsafe_index_put.default,
)  # fmt: skip
PADS = (aten.slice_backward.default, aten.select_backward.default)
LAYER_NORMS = (torch.ops.aten.native_layer_norm.default, torch.ops.aten.native_layer_norm_backward.default)


def fake_mode() -> FakeTensorMode:
    """A mode that is never entered: only what derives from fake weights and inputs is fake.

    Integer inputs, masks and positions stay real and are computed, so that a branch on their values (is there any
    padding?) goes the way of a real run.
    """
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_tensor(
    tensor: torch.Tensor, mode: FakeTensorMode, device: torch.device | None = None, real: Real = "integers"
) -> torch.Tensor:
    """A tensor without memory of the same shape, strides, dtype and class, on `device` (default: its own).

    Tensors of integers are real copies, all that require no gradient where `real` is "all", and none where "none";
    parameters never are, of integers (quantised ones) neither. Their attributes are shared.
    """
    where = device or tensor.device
    if where.type == "meta" or (where.type == "cuda" and not torch.cuda.is_available()):
        where = torch.device("cpu")
    if isinstance(tensor, torch.nn.Parameter):
        with mode:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=where)
        parameter = torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
        parameter.__dict__.update(own_attributes(tensor))
        return parameter
    is_real = real != "none" and not (isinstance(tensor, FakeTensor) or tensor.is_meta)
    if is_real and (
        (real == "all" and not tensor.requires_grad) or not (tensor.is_floating_point() or tensor.is_complex())
    ):
        return tensor.detach().to(where, copy=True)
    with mode:  # a view holds all of its storage
        whole = torch.empty(tensor.untyped_storage().nbytes() // tensor.itemsize, dtype=tensor.dtype, device=where)
        fake = whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return fake.requires_grad_(tensor.requires_grad)


def fake_copy(
    value: Value,
    mode: FakeTensorMode,
    device: torch.device | None = None,
    real: Real = "integers",
    stand_ins: Mapping[int, torch.nn.Module] | None = None,
) -> Value:
    """Deep copy of a module, or of nested call arguments, with `fake_tensor` of every tensor; ties stay ties.

    `stand_ins` has what takes the place of modules, by their ids. Functions that are attributes of a module call the
    copies of the modules that they call. Raises ValueError for what Python cannot copy.
    """
    memo: dict[int, Any] = {**(stand_ins or {})}
    kept: list[torch.Tensor] = []
    for tensor in _tensors(value, stand_ins or {}):
        if id(tensor) not in memo:
            memo[id(tensor)] = fake_tensor(tensor, mode, device, real)
            kept.append(tensor)
    try:
        copied = copy.deepcopy(value, memo)
        if isinstance(value, torch.nn.Module):
            rebind_functions(value, memo)
        return copied
    except Exception as error:
        raise ValueError(
            f"planning works on a copy of the model and its inputs, and they cannot be copied: {error}"
        ) from error


def _tensors(value: Any, left_out: Collection[int]) -> Iterator[torch.Tensor]:
    """The tensors in nested containers or, but for the modules that are left out, in a module."""
    if isinstance(value, torch.nn.Module):
        for module in _modules(value, left_out, set()):
            for attribute in vars(module).values():
                yield from _tensors_inside(attribute)
    else:
        yield from _tensors_inside(value)


def _modules(module: torch.nn.Module, left_out: Collection[int], seen: set[int]) -> Iterator[torch.nn.Module]:
    if id(module) not in left_out and id(module) not in seen:
        seen.add(id(module))
        yield module
        for child in module.children():
            yield from _modules(child, left_out, seen)


def _tensors_inside(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list, set, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_inside(item)


class RealKernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets fake operators do what the real kernels of a device do and their shape functions do not.

    `aten._grouped_mm` (mixtures of experts) takes all dtypes, `aten._ctc_loss` real lengths of texts; layer norms and
    their gradients are made from contiguous copies and are contiguous; real masks pick what they pick. On the CPU
    `velora.compress` takes memory for its products, arithmetic on two dtypes first casts an operand, the backward of
    attention copies a gradient that is not laid out [batch, length, heads], convolutions copy what is not laid out as
    their weight, and some storages are larger than their tensors. The backward of a view that was written in place (a
    linear's output of three dimensions) copies the gradient.
    """

    supports_higher_order_operators = True

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.casts = ARITHMETIC if device.type == "cpu" else ()
        self._padded: weakref.ref[torch.UntypedStorage] | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._grouped_mm.default and isinstance(args[0], FakeTensor):
            a, b = args[:2]
            shape = [a.shape[-2], b.shape[-1]]
            if a.dim() == b.dim():  # a product for each group
                groups = a if a.dim() == 3 else args[2] if len(args) > 2 else (kwargs or {})["offs"]
                shape.insert(0, groups.shape[0])
            return a.new_empty(shape)
        if func is aten._ctc_loss.Tensor and not any(isinstance(a, FakeTensor) for a in args[1:4]):
            steps, batch = args[0].shape[0], args[3].numel()
            states = 2 * int(args[3].max()) + 1  # of the longest text, whose length is real
            return args[0].new_empty(batch), args[0].new_empty(batch, steps, states)
        if func in INDEXING and isinstance(args[0], FakeTensor):
            args = (args[0], [part for index in args[1] for part in _as_numbers(index)], *args[2:])
        on_cpu = self.device.type == "cpu"
        if on_cpu and func is torch.ops.velora.compress.default and isinstance(args[0], FakeTensor):
            compress_blocks(args[0], args[1], 1)
        copied = None
        if func is torch.ops.velora.linear.default and isinstance(args[0], FakeTensor):
            copied = args[0].reshape(-1, args[0].shape[-1])  # as a linear copies rows that are not one after the other
        if func is FLASH_BACKWARD and isinstance(args[0], FakeTensor):
            args = (args[0].transpose(1, 2).contiguous().transpose(1, 2), *args[1:])
        if func in LAYER_NORMS:
            args = tuple(a.contiguous() if isinstance(a, FakeTensor) and a.dim() else a for a in args)
        if func in self.casts and all(isinstance(a, FakeTensor) and a.dim() for a in args):
            dtype = torch.promote_types(args[0].dtype, args[1].dtype)
            args = tuple(a if a.dtype == dtype else a.to(dtype) for a in args)
        result = func(*args, **(kwargs or {}))
        del copied
        is_fake = bool(args) and isinstance(args[0], FakeTensor)
        if func in PADS and is_fake:
            self._padded = weakref.ref(result.untyped_storage())
        if func is aten.view.default and is_fake and _is_backward_of_written_view():
            is_made = self._padded is not None and self._padded() is args[0].untyped_storage()  # for a part of the view
            return result if is_made else result.new_empty(result.shape)
        if not on_cpu or not is_fake:
            return result
        take_copies(func, args, result)
        return as_on_cpu(func, args, result)


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
def kernels_of(device: torch.device) -> Iterator[None]:
    """The context in which fake operators behave as the kernels of `device` do."""
    fused = device.type == "cuda" and not torch.cuda.is_available()
    with RealKernels(device), FusedAttention() if fused else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def as_compiled() -> Iterator[None]:
    """The context in which a forward takes the way that it takes when torch.compile traces it."""
    flags = torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag
    torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag = True, False
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag = flags
