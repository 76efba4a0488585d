"""Models that are distributed already, which planning cannot copy."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def check_unwrapped(model: torch.nn.Module, is_factored: bool) -> None:
    """Raises ValueError for a model that is wrapped by DDP or FSDP or has sharded weights.

    For factored gradients that is also one with weights of any other class that wraps tensors.
    """
    wrappers: list[type] = [torch.nn.parallel.DistributedDataParallel]
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FullyShardedDataParallel

        wrappers.append(FullyShardedDataParallel)
    for name, module in model.named_modules():
        own = [*module.parameters(recurse=False)]
        has_other = any(_is_sharded(p) or (is_factored and is_traceable_wrapper_subclass(p)) for p in own)
        if has_other or isinstance(module, tuple(wrappers)):
            raise ValueError(
                f"velora_fx comes before DDP, FSDP and DTensor, and {name or 'the model'} is wrapped already: call "
                "velora_fx.optimize on the plain model first, with example_inputs, and wrap it then"
            )


def _is_sharded(parameter: torch.Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)
