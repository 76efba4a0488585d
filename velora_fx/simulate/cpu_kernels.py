"""What kernels of the CPU take meanwhile, and leave larger than the tensors in it: shape functions do not tell."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

aten = torch.ops.aten
LOSSES = (
    aten.mse_loss.default,
    aten.smooth_l1_loss.default,
    aten.binary_cross_entropy.default,
    aten.soft_margin_loss.default,
)
LARGER = (*LOSSES, aten.col2im.default, aten._embedding_bag.default, aten.mkldnn_rnn_layer.default)  # `as_on_cpu`
CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)  # `take_copies`


def as_on_cpu(func: Any, args: tuple[Any, ...], result: Any) -> Any:
    """The result of a fake operator with the storages that the real one of the CPU gives it.

    Losses are means in the storage of what they are the mean of, `col2im` shrinks a tensor that was like its input,
    the offsets of bags have one more, and oneDNN's layers of an LSTM keep a workspace for their backward.
    """
    if func in LOSSES and result.dim() == 0:
        terms: torch.Size = torch.broadcast_shapes(args[0].shape, args[1].shape)  # type: ignore[no-untyped-call]
        return _held(result, terms.numel())
    if func is aten.col2im.default:
        return _held(result, max(result.numel(), args[0].numel()))
    if func is aten._embedding_bag.default and result[1].numel():
        return (result[0], _held(result[1], result[1].numel() + 1), *result[2:])
    if func is aten.mkldnn_rnn_layer.default and torch.is_grad_enabled():
        return (*result[:3], result[3].new_empty(_workspace_size(args)))
    return result


def take_copies(func: Any, args: tuple[Any, ...], result: Any) -> None:
    """Takes and lets go of what the real operator of the CPU holds beside a fake one's result before it returns.

    oneDNN's convolutions copy operands that are not laid out as they compute. With channels last, as compilers have it,
    they hold the weight in blocks besides, and its gradient in blocks and as it is made before it is laid out so; else
    what they hold is up to their sizes.
    """
    if func is aten.convolution.default:
        x, weight = args[:2]
        operands, held = [x], 1
    elif func is aten.convolution_backward.default:
        x, weight = args[1:3]
        operands, held = list(args[:2]), 1 if result[1] is None else 2
    else:
        return
    layouts = {_layout_of(x), _layout_of(weight)} - {torch.contiguous_format}
    layout = layouts.pop() if layouts else torch.contiguous_format
    taken = [t.new_empty(t.shape) for t in operands if not t.is_contiguous(memory_format=layout)]
    if layout != torch.contiguous_format and weight[0, 0].numel() > 1:
        taken += [weight.new_empty(weight.shape) for _ in range(held)]
    del taken


def _layout_of(tensor: torch.Tensor) -> torch.memory_format:
    """Channels last where only that fits how the tensor is laid out."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim(), torch.contiguous_format)
    return last if not tensor.is_contiguous() and tensor.is_contiguous(memory_format=last) else torch.contiguous_format


def _held(tensor: torch.Tensor, numel: int) -> torch.Tensor:
    """A tensor like this one in a storage of `numel` elements."""
    if numel <= tensor.numel():
        return tensor
    return tensor.new_empty(numel).as_strided(tensor.shape, tensor.stride())


def _workspace_size(args: tuple[Any, ...]) -> int:
    """Bytes of an LSTM's workspace: the real kernel tells it of few steps, and each step takes as many."""
    steps, *shape = args[0].shape
    few = {min(steps, 32), min(steps, 64)}
    with _disable_current_modes(), torch.enable_grad():  # it keeps none without
        weights = [torch.zeros(t.shape, dtype=t.dtype) for t in args[1:7]]
        inputs = {n: torch.zeros(n, *shape, dtype=args[0].dtype) for n in few}
        sizes = {n: aten.mkldnn_rnn_layer.default(x, *weights, *args[7:])[3].numel() for n, x in inputs.items()}
    least, most = min(few), max(few)
    each = (sizes[most] - sizes[least]) // max(most - least, 1)
    return int(sizes[most] + (steps - most) * each)
