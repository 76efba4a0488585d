"""The live tensors of a module by name."""

from __future__ import annotations

import torch

CARRIER = "_carrier"


def state_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The live parameters and buffers of a module by dotted name, tied ones once, but for carriers."""
    parameters = dict(module.named_parameters())
    own = {name: tensor for name, tensor in parameters.items() if not _is_carrier(name, parameters)}
    return {**own, **dict(module.named_buffers())}


def carriers_of(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The live carriers of a module by dotted name: that of their weight with "_carrier" after it."""
    parameters = dict(module.named_parameters())
    return {name: tensor for name, tensor in parameters.items() if _is_carrier(name, parameters)}


def _is_carrier(name: str, parameters: dict[str, torch.nn.Parameter]) -> bool:
    return name.endswith(CARRIER) and name.removesuffix(CARRIER) in parameters
