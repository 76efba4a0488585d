"""What a block is at a call: its live tensors by name, what of a key depends on it, and whether hooks are inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from velora_fx.capture.state import carriers_of, leave_out, state_of


class Seen(NamedTuple):
    """A block at one call: its parameters and buffers, its carriers, what a key says of it, and whether any module
    inside of it has hooks."""

    state: dict[str, torch.Tensor]
    carriers: dict[str, torch.Tensor]
    key: tuple[Any, ...]
    has_hooks: bool


class LiveBlock:
    """Looks at a block at every call, and works out names and the key anew only where they may have changed.

    All that they depend on (the modules' types, modes and names, which of them are shared, and the tensors' names,
    dtypes and devices, which of them are tied and want gradients) is compared each time; no tensor is held.
    """

    def __init__(self, block: torch.nn.Module) -> None:
        self.block = block
        self.traits: list[Any] = []
        self.places: dict[str, int] = {}  # of parameters and buffers among the tensors
        self.carrier_places: dict[str, int] = {}
        self.key: tuple[Any, ...] = ()

    def look(self) -> Seen:
        """What the block is now."""
        modules, tensors, traits = _walk(self.block)
        if traits != self.traits:
            self._name(tensors)
            self.traits = traits
        return Seen(
            {name: tensors[index] for name, index in self.places.items()},
            {name: tensors[index] for name, index in self.carrier_places.items()},
            self.key,
            any(
                [
                    m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
                    for m in modules
                ]
            ),
        )

    def _name(self, tensors: list[Any]) -> None:
        places = {id(tensor): index for index, tensor in enumerate(tensors)}
        state = state_of(self.block)
        self.places = {name: places[id(tensor)] for name, tensor in state.items()}
        self.carrier_places = {name: places[id(tensor)] for name, tensor in carriers_of(self.block).items()}
        self.key = (key_of_modules(self.block), key_of_state(state))


def _walk(block: torch.nn.Module) -> tuple[list[torch.nn.Module], list[Any], list[Any]]:
    """The modules inside of a block, the tensors of all with None where one is missing, and what can change of them."""
    modules, tensors, traits = [block], list[Any](), list[Any]()
    places = {id(block): 0}
    for module in modules:  # it grows meanwhile
        children, parameters, buffers = module._modules, module._parameters, module._buffers
        has_carriers = bool(module._state_dict_hooks) and leave_out in module._state_dict_hooks.values()
        traits.append((type(module), module.training, "forward" in module.__dict__, has_carriers))
        if children:
            traits += children
            for child in children.values():
                traits.append(None if child is None else places.setdefault(id(child), len(places)))
                if child is not None and places[id(child)] == len(modules):
                    modules.append(child)
        if parameters:
            traits += parameters
            tensors += parameters.values()
        if buffers:
            traits += buffers
            tensors += buffers.values()
    places = {}
    traits += [
        None if t is None else (places.setdefault(id(t), len(places)), t.dtype, t.device, t.requires_grad)
        for t in tensors
    ]
    return modules[1:], tensors, traits


def key_of_modules(block: torch.nn.Module) -> tuple[Any, ...]:
    """The modules of a block in a key: names, types, modes, and whether a forward inside was replaced."""
    return tuple([(n, type(m), m.training, bool(n) and "forward" in vars(m)) for n, m in block.named_modules()])


def key_of_state(state: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
    """The parameters and buffers of a block in a key."""
    return tuple([(name, t.dtype, t.device.type, t.device.index, t.requires_grad) for name, t in state.items()])
