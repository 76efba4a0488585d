"""The live tensors of a module by name."""

from __future__ import annotations

from typing import Any

import torch

CARRIER = "_carrier"


def state_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The live parameters and buffers of a module by dotted name, tied ones once, but for carriers."""
    carriers = carriers_of(module)
    own = {name: tensor for name, tensor in module.named_parameters() if name not in carriers}
    return {**own, **dict(module.named_buffers())}


def carriers_of(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The live carriers of a module by dotted name: that of their weight with "_carrier" after it."""
    return {
        f"{name}.{own}" if name else own: carrier
        for name, child in module.named_modules()
        for own, carrier in own_carriers(child).items()
    }


def own_carriers(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Those among the module's own parameters; of a module that leaves none out of its state dict there are none."""
    if leave_out not in module._state_dict_hooks.values():
        return {}
    own = module._parameters
    found = {name: carrier for name, carrier in own.items() if name.removesuffix(CARRIER) in own}
    return {name: carrier for name, carrier in found.items() if name.endswith(CARRIER) and carrier is not None}


def leave_out(module: torch.nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """The hook on the state dict of a module with carriers, by which it is known."""
    for name in own_carriers(module):
        state.pop(prefix + name, None)
