"""VeLoRA operators in the place of linears."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

import velora_fx.ops  # noqa: F401  (defines torch.ops.velora)
from velora_fx.passes.find_products import find_products


@dataclass(frozen=True)
class Choice:
    """What becomes of one linear: its input `tensor` is kept as projections of sub-tokens of `sub_token_size`."""

    tensor: str
    sub_token_size: int


def swap(gm: GraphModule, choices: Mapping[str, Choice]) -> GraphModule:
    """Replaces the linears named in `choices` (by consumer); linears that read one input share its projections.

    The graph gets one more input per distinct tensor of `choices`, in their order: the projection v [G, M].

    Before::

        %y = linear(%x, %weight, %bias)

    After::

        %z = velora.compress(%x, %projection_0)
        %y = velora.linear(%x, %weight, %bias, %z, %projection_0, None)
    """
    projections = _add_projections(gm, choices)
    compressed: dict[tuple[Node, str], Node] = {}
    for product in find_products(gm):
        choice = choices.get(product.consumer)
        if choice is None or product.reason is not None:
            continue
        node = product.node
        x, weight, bias = (*node.args, None)[:3]
        assert isinstance(x, Node)
        v = projections[choice.tensor]
        with gm.graph.inserting_before(node):
            if (x, choice.tensor) not in compressed:
                compressed[x, choice.tensor] = gm.graph.call_function(torch.ops.velora.compress.default, (x, v))
            z = compressed[x, choice.tensor]
            new = gm.graph.call_function(torch.ops.velora.linear.default, (x, weight, bias, z, v, None))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    return gm


def _add_projections(gm: GraphModule, choices: Mapping[str, Choice]) -> dict[str, Node]:
    placeholders = {str(node.target): node for node in gm.graph.nodes if node.op == "placeholder"}
    after = list(placeholders.values())[-1]
    projections = {}
    for index, tensor in enumerate(dict.fromkeys(choice.tensor for choice in choices.values())):
        name = f"projection_{index}"
        if name not in placeholders:
            with gm.graph.inserting_after(after):
                placeholders[name] = gm.graph.placeholder(name)
        after = projections[tensor] = placeholders[name]
    return projections
