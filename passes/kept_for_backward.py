"""What a compiled backward graph needs each kept tensor for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from velora_fx.passes.parameter_of import operation_of

aten = torch.ops.aten
# Views, and copies that the code generator turns into other layouts or precisions of the same tensor.
SAME_TENSOR = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.permute.default, aten.t.default,
    aten.transpose.int, aten.expand.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default,
    aten.clone.default, aten.alias.default, torch.ops.prims.convert_element_type.default, aten._to_copy.default,
)  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """The uses of a kept tensor x: the gradients `dW = dYᵀ x`, as (number of the graph's input, width of x), and the
    other operations by name."""

    gradients_of: tuple[tuple[int, int], ...]
    operations: tuple[str, ...]


def kept_for_backward(gm: GraphModule, num_constants: int = 0) -> dict[str, Kept]:
    """Sorts the uses of each tensor that a partitioned backward graph takes, by the name of its placeholder.

    Output k of such a graph is the gradient of input k of the forward graph, constants first. For `dW = dYᵀ x` the
    kept x leads through views and casts to a matrix product, and that one through views and casts to an output.
    """
    outputs = gm.graph.output_node().args[0]
    assert isinstance(outputs, (tuple, list))
    products: dict[Node, list[int]] = {}
    for number, output in enumerate(outputs[num_constants:]):
        source = _source(output)
        if isinstance(source, Node) and source.target is aten.mm.default:
            products.setdefault(source, []).append(number)
    found = {}
    for placeholder in gm.graph.find_nodes(op="placeholder"):
        gradients: list[tuple[int, int]] = []
        operations: list[str] = []
        for user, used in _uses(placeholder):
            if user in products:
                width = user.meta["val"].shape[0 if user.args[0] is used else 1]
                gradients += [(number, int(width)) for number in products[user]]
            elif user.op != "output":
                operations.append(operation_of(user))
        found[placeholder.name] = Kept(tuple(dict.fromkeys(gradients)), tuple(dict.fromkeys(operations)))
    return found


def _source(node: object) -> object:
    while isinstance(node, Node) and node.target in SAME_TENSOR:
        node = node.args[0]
    return node


def _uses(node: Node) -> list[tuple[Node, Node]]:
    """The users of a tensor and of its views and casts, each with which of these it takes."""
    found = []
    for user in node.users:
        found += _uses(user) if user.target in SAME_TENSOR else [(user, node)]
    return found
