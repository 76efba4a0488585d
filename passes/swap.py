"""VeLoRA operators in the place of linears."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.fx import GraphModule, Node

import velora_fx.ops.velora  # noqa: F401  (defines torch.ops.velora)
from velora_fx.passes.find_products import find_products

CARRIER = "_carrier"  # after the name of the weight that a carrier stands for
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Carrier:
    """The parameter whose gradient stands for that of `parameter`, factored.

    It is shaped like the parameter, with D / M in the place of D along `input_dim`, where the input's features lie.
    """

    parameter: str
    input_dim: int

    @property
    def name(self) -> str:
        """Its dotted name."""
        return self.parameter + CARRIER


@dataclass(frozen=True)
class Choice:
    """What becomes of one linear: its input `tensor` is kept as projections of sub-tokens of `sub_token_size`, and its
    `carrier`, if it has one, gets the gradient."""

    tensor: str
    sub_token_size: int
    carrier: Carrier | None = None


def swap(gm: GraphModule, choices: Mapping[str, Choice]) -> GraphModule:
    """Replaces the linears named in `choices` (by consumer); linears that read one input share its projections.

    The graph gets one more input for each carrier in `choices`, in their order, and then for each distinct tensor: the
    projection v [G, M].

    Before::

        %y = linear(%x, %weight, %bias)

    After::

        %z = velora.compress(%x, %projection_0)
        %y = velora.linear(%x, %weight, %bias, %z, %projection_0, None)
    """
    carriers = _add_inputs(gm, "carrier", [choice.carrier for choice in choices.values() if choice.carrier])
    projections = _add_inputs(gm, "projection", [choice.tensor for choice in choices.values()])
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
            carrier = carriers[choice.carrier] if choice.carrier else None
            if choice.carrier and choice.carrier.input_dim == 0:
                carrier = gm.graph.call_function(torch.ops.aten.t.default, (carrier,))
            new = gm.graph.call_function(torch.ops.velora.linear.default, (x, weight, bias, z, v, carrier))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    return gm


def _add_inputs(gm: GraphModule, kind: str, keys: Sequence[Key]) -> dict[Key, Node]:
    """Adds an input for each distinct key behind those that there are; a graph that was swapped before has them."""
    placeholders = {str(node.target): node for node in gm.graph.nodes if node.op == "placeholder"}
    after = list(placeholders.values())[-1]
    added = {}
    for index, key in enumerate(dict.fromkeys(keys)):
        name = f"{kind}_{index}"
        if name not in placeholders:
            with gm.graph.inserting_after(after):
                placeholders[name] = gm.graph.placeholder(name)
        after = added[key] = placeholders[name]
    return added
