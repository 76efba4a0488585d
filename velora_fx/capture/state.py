"""The live tensors of a module by name."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from velora_fx.capture.attributes import holds_tensor, is_plain_object
from velora_fx.passes.swap import CARRIER


def state_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The live parameters and buffers of a module by dotted name, tied ones once, but for carriers."""
    carriers = carriers_of(module)
    own = {name: tensor for name, tensor in module.named_parameters() if name not in carriers}
    return {**own, **dict(module.named_buffers())}


def call_with(
    module: torch.nn.Module, state: Mapping[str, torch.Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """What a module returns with other tensors, by their first names, in the place of its parameters and buffers.

    `torch.func.functional_call` on its own would leave them in a module that is held under two names.
    """
    live = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    given = {id(live[name]): tensor for name, tensor in state.items()}
    places = {
        f"{name}.{own}" if name else own: given[id(tensor)]
        for name, child in module.named_modules()
        for own, tensor in (*child._parameters.items(), *child._buffers.items())
        if id(tensor) in given
    }
    return torch.func.functional_call(module, places, args, dict(kwargs), tie_weights=False)


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


def own_attributes(tensor: torch.Tensor) -> dict[str, Any]:
    """What was set on a tensor, real or fake: a learning rate of its own, the statistics of a quantised weight."""
    return {name: value for name, value in vars(tensor).items() if name not in _attributes_of_fakes()}


@functools.cache
def _attributes_of_fakes() -> frozenset[str]:
    with FakeTensorMode():
        return frozenset({*vars(torch.nn.Parameter(torch.empty(0))), "_is_param"})


def attached_to(tensor: torch.Tensor) -> dict[str, Any]:
    """Those of them that hold tensors, without which a quantised weight means nothing."""
    return {name: value for name, value in own_attributes(tensor).items() if holds_tensor(value)}


def attached_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors in the attributes of a tensor, also those in plain objects inside of plain objects."""
    found, seen = [], set()
    pending = list(attached_to(tensor).values())
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple, set)):
            pending += value
        elif isinstance(value, dict) or is_plain_object(value):
            pending += (value if isinstance(value, dict) else vars(value)).values()
    return found
