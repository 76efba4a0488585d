"""Carriers: parameters, zero between steps, that the optimizer steps in place of weights M times larger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from velora_fx.capture import carriers_of, leave_out, own_carriers
from velora_fx.passes.swap import CARRIER
from velora_fx.runtime.factored_region import FactoredRegion


def add_carriers(region: FactoredRegion) -> None:
    """Registers the carriers of a region beside their weights, and freezes the weights: autograd takes the carriers.

    State dicts leave them out. ValueError where a weight's module has something else of that name.
    """
    for carrier, v in region.directions.items():
        owner, _, name = carrier.name.rpartition(".")
        module = region.block.get_submodule(owner)
        if hasattr(module, name):
            raise ValueError(
                f"{type(module).__name__} {owner} has an attribute {name}, which is what the carrier of its weight "
                "would be called: rename it, or use gradients='dense'"
            )
        weight = region.block.get_parameter(carrier.parameter)
        shape = list(weight.shape)
        shape[carrier.input_dim] = v.shape[0]
        _put(module, name, torch.nn.Parameter(weight.new_zeros(shape)))


def remove_carriers(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Takes all carriers out of a model and has autograd take its weights again; returns them by dotted name."""
    carriers = carriers_of(model)
    for full in carriers:
        owner, _, name = full.rpartition(".")
        module = model.get_submodule(owner)
        module.get_parameter(name.removesuffix(CARRIER)).requires_grad_(True)
        delattr(module, name)
        if not own_carriers(module):
            _drop(module._state_dict_hooks, leave_out)
            _drop(module._load_state_dict_pre_hooks, _fill_in)
    return carriers


def _drop(hooks: dict[int, Any], hook: Any) -> None:
    """Takes a hook off, which PyTorch may have wrapped."""
    for key in [key for key, own in hooks.items() if getattr(own, "hook", own) is hook]:
        del hooks[key]


def put_back(model: torch.nn.Module, carriers: Mapping[str, torch.nn.Parameter]) -> None:
    """The inverse of `remove_carriers`."""
    for full, carrier in carriers.items():
        owner, _, name = full.rpartition(".")
        _put(model.get_submodule(owner), name, carrier)


def _put(module: torch.nn.Module, name: str, carrier: torch.nn.Parameter) -> None:
    weight = module.get_parameter(name.removesuffix(CARRIER))
    weight.requires_grad_(False)
    weight.grad = None  # of training before: nothing would step or clear it
    if not own_carriers(module):
        module.register_state_dict_post_hook(leave_out)  # type: ignore[no-untyped-call]
        module.register_load_state_dict_pre_hook(_fill_in)  # type: ignore[no-untyped-call]
    module.register_parameter(name, carrier)


def _fill_in(module: torch.nn.Module, state: dict[str, Any], prefix: str, metadata: Any, *_: Any) -> None:
    """Gives a strict load what it looks for: the carriers that are there or, to be assigned, zeros like the weight."""
    for name, carrier in own_carriers(module).items():
        weight = state.get(prefix + name.removesuffix(CARRIER))
        if metadata.get("assign_to_params_buffers") and isinstance(weight, torch.Tensor):
            state[prefix + name] = weight.new_zeros(carrier.shape)
        else:
            state[prefix + name] = carrier
