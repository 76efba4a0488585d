"""What a compiled backward graph needs each kept tensor for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
PARTS = (aten.slice.Tensor, aten.select.int)
PADDED = (aten.constant_pad_nd.default,)


@dataclass(frozen=True)
class Kept:
    """The uses of a kept tensor x: the gradients `dW = dYᵀ x`, as (number of the graph's input, rows and width of x),
    and the other operations by name."""

    gradients_of: tuple[tuple[int, int, int], ...]
    operations: tuple[str, ...]


def kept_for_backward(gm: GraphModule, num_constants: int = 0) -> dict[str, Kept]:
    """Sorts the uses of each tensor that a partitioned backward graph takes, by the name of its placeholder.

    Output k of such a graph is the gradient of input k of the forward graph, constants first. For `dW = dYᵀ x` the
    kept x leads through views and casts to a matrix product, and that one through views and casts to an output. On a
    GPU the compiler may pad a product's operands, and cut its result: x has the sizes without, even where it is kept
    padded.
    """
    outputs = gm.graph.output_node().args[0]
    assert isinstance(outputs, (tuple, list))
    products: dict[Node, list[tuple[int, torch.Size]]] = {}
    for number, output in enumerate(outputs[num_constants:]):
        gradient = _source(output, SAME_TENSOR)
        product = _source(gradient, (aten.slice.Tensor,))
        if isinstance(product, Node) and product.target is aten.mm.default:
            products.setdefault(product, []).append((number, gradient.meta["val"].shape))
    found = {}
    for placeholder in gm.graph.find_nodes(op="placeholder"):
        gradients: list[tuple[int, int, int]] = []
        operations: list[str] = []
        for user, used in _uses(placeholder):
            if user in products:
                side = 0 if user.args[0] is used else 1
                gradients += [(number, _num_rows(user), int(shape[side])) for number, shape in products[user]]
            elif user.op != "output":
                operations.append(operation_of(user))
        found[placeholder.name] = Kept(tuple(dict.fromkeys(gradients)), tuple(dict.fromkeys(operations)))
    return found


def _source(node: Any, through: Sequence[object]) -> Any:
    while isinstance(node, Node) and node.target in through:
        node = node.args[0]
    return node


def _num_rows(product: Node) -> int:
    """The length that a product sums over, without padding."""
    left, right = (_source(operand, PADDED).meta["val"].shape for operand in product.args)
    return min(int(left[1]), int(right[0]))


def _uses(node: Node) -> list[tuple[Node, Node]]:
    """The users of a tensor and of its views, parts, casts and padded copies, each with which of these it takes."""
    found = []
    for user in node.users:
        found += _uses(user) if user.target in (*SAME_TENSOR, *PARTS, *PADDED) else [(user, node)]
    return found
