"""Tells when a batch is larger than what was planned for."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from velora_fx.capture import named_tensors, parameter_names


class ModelHook:
    """A forward pre-hook that this library leaves on a model; through `torch.compile(model)` it stays outside of the
    compiled code."""

    handle: Any = None

    def install(self, model: torch.nn.Module) -> None:
        """Hangs it on the model."""
        from torch._dynamo.eval_frame import skip_code

        # As a frame of its own it would be compiled, with guards on what it looks at.
        skip_code(type(self).__call__.__code__)
        self.handle = model.register_forward_pre_hook(self, with_kwargs=True)

    def remove(self) -> None:
        """Takes it off the model."""
        self.handle.remove()

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise NotImplementedError


class BatchWatch(ModelHook):
    """Warns, once, of an input in training with more entries than planned for.

    `planned` gives the shape of each input tensor by its name, `seen` the largest since it was last cleared. Where the
    model is compiled as a part of a larger module, nothing is seen.
    """

    def __init__(self, names: Sequence[str], planned: Mapping[str, tuple[int, ...]]) -> None:
        self.names = tuple(names)
        self.planned = dict(planned)
        self.seen: dict[str, tuple[int, ...]] = {}
        self.warned = False
        self.inputs: dict[int, int] | None = None  # of a step that is measured: bytes by address

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or not module.training or not torch.is_grad_enabled():
            return
        for name, tensor in named_tensors(self.names, args, kwargs):
            shape = tuple(tensor.shape)
            if self.inputs is not None:
                self.inputs[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            self.seen[name] = max(shape, self.seen.get(name, shape), key=math.prod)
            self.compare(name, shape)

    def compare(self, name: str, shape: tuple[int, ...]) -> None:
        """Warns, once, of a shape with more entries than the planned one, or as many in longer texts."""
        planned = self.planned.get(name)
        if planned is None or self.warned:
            return
        # A list: what the compiler would make of a generator here is an error.
        is_longer = any([size > known for size, known in zip(shape[1:], planned[1:], strict=False)])
        if (math.prod(shape), is_longer) <= (math.prod(planned), False):
            return
        self.warned = True
        warnings.warn(
            f"velora_fx: planned for {name} of {_product(planned)}, got {_product(shape)}: the step may need more than "
            "the plan says; plan with the largest batch as example_inputs",
            stacklevel=3,
        )


def unwatch(model: torch.nn.Module) -> None:
    """Takes every hook of this library off the model and the modules in it."""
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, ModelHook):
                hook.remove()


def watch_batches(model: torch.nn.Module, planned: Mapping[str, tuple[int, ...]]) -> BatchWatch:
    """Has the model warn of a batch larger than the planned input shapes."""
    watch = BatchWatch(parameter_names(model), planned)
    watch.install(model)
    return watch


def _product(shape: tuple[int, ...]) -> str:
    if len(shape) < 2:
        return str(math.prod(shape))
    return f"{' x '.join(map(str, shape))} = {math.prod(shape)}"
