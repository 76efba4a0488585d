"""The graph of a block that leaves its keys and values in a cache, as Hugging Face models have it by default."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils import _pytree
from torch.utils._python_dispatch import _disable_current_modes

from velora_fx.capture import (
    call_with,
    export_function,
    isolated,
    own_forward,
    plain_graph_module,
    state_of,
    tensors_inside,
)
from velora_fx.passes import PREPARE, run


def filling_graph(
    block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], caches: Sequence[Any]
) -> GraphModule:
    """The forward of a block with empty caches: `gm(*state, *tensors)` returns its outputs and what they hold then.

    Regions leave such caches out. What an untouched block does under torch.compile is another matter: the compiled
    graph returns keys and values, and the backward is given a gradient of zeros for each.
    """
    leaves, spec = _pytree.tree_flatten((args, kwargs), is_leaf=lambda value: any(value is cache for cache in caches))
    state = state_of(block)

    def filled(ts: list[torch.Tensor]) -> list[Any]:
        given = iter(ts[len(state) :])
        with _disable_current_modes():  # a cache may hold tensors, of which tracing would lose track
            copies = [leaf if isinstance(leaf, torch.Tensor) else copy.deepcopy(leaf) for leaf in leaves]
        values = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in copies]
        call_args, call_kwargs = _pytree.tree_unflatten(values, spec)
        output = call_with(block, dict(zip(state, ts, strict=False)), call_args, call_kwargs)
        held = [t for value in values if not isinstance(value, torch.Tensor) for t in tensors_inside(value)]
        return [*(leaf for leaf in _pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)), *held]

    inputs = [*state.values(), *(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))]
    with isolated(), own_forward(block, None):
        program = export_function(filled, inputs)
    return run(plain_graph_module(program, list(state)), PREPARE)
