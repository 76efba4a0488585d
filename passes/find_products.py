"""The matrix products of a graph with its parameters."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from velora_fx.passes.canonicalize import parameter_of

aten = torch.ops.aten
OTHER_PRODUCTS = ("mm", "matmul", "einsum", "bilinear", "conv")  # parts of the names: addmm, bmm, _grouped_mm, conv2d


@dataclass(frozen=True)
class Product:
    """One product with a parameter: `consumer` names it ("mlp.down_proj", "#2" appended at its second use).

    `consumer` is "" where the region is the linear itself; `node` is the graph node, `parameter` the parameter's dotted
    name, `reason` why the product cannot be compressed (None for a `linear`).
    """

    consumer: str
    parameter: str
    node: Node
    reason: str | None


def find_products(gm: GraphModule) -> tuple[Product, ...]:
    """Lists the products with a parameter in graph order, each with the name of the module it belongs to."""
    state: dict[str, str] = gm.meta["state"]
    uses: Counter[str] = Counter()
    products = []
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        reason = _reason(node)
        if reason is None or "conv" in _operation(node):
            operands = [node.args[1]]
        elif any(part in _operation(node) for part in OTHER_PRODUCTS):
            operands = list(node.all_input_nodes)
        else:
            continue
        for operand in operands:
            source = parameter_of(operand)
            if source is None or source.name not in state:
                continue
            parameter = state[source.name]
            uses[parameter] += 1
            owner, _, attribute = parameter.rpartition(".")
            consumer = owner if attribute == "weight" else parameter
            if uses[parameter] > 1:
                consumer = f"{consumer}#{uses[parameter]}"
            products.append(Product(consumer, parameter, node, reason))
    return tuple(products)


def _operation(node: Node) -> str:
    name = getattr(node.target, "__name__", str(node.target))
    return name.split(".")[0]


def _reason(node: Node) -> str | None:
    if node.target is aten.linear.default:
        return None
    return f"it is used by {_operation(node)}, and only linear layers can be compressed"
