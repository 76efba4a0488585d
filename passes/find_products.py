"""The matrix products of a graph with its parameters."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from velora_fx.passes.parameter_of import is_transpose, nodes_without_grad, operation_of, parameter_of

aten = torch.ops.aten
OTHER_PRODUCTS = frozenset({
    "mm", "bmm", "addmm", "addbmm", "baddbmm", "matmul", "mv", "addmv", "dot", "vdot", "inner", "outer", "ger",
    "einsum", "tensordot", "chain_matmul", "linalg_multi_dot", "bilinear", "_grouped_mm", "_scaled_mm",
    "_scaled_grouped_mm",
})  # fmt: skip


@dataclass(frozen=True)
class Product:
    """One product with a parameter: `consumer` names it ("mlp.down_proj", "#2" appended at its second use).

    `consumer` is "" where the region is the linear itself; `node` is the graph node, `parameter` the parameter's dotted
    name, `reason` why the product cannot be compressed (None for a `linear`). `input_dim` is the dimension of a matrix
    along which the features of the product's input lie, None where it is not all of the parameter or the graph uses the
    parameter for something else too.
    """

    consumer: str
    parameter: str
    node: Node
    reason: str | None
    input_dim: int | None = None


def find_products(gm: GraphModule) -> tuple[Product, ...]:
    """Lists the products with a parameter in graph order, each with the name of the module it belongs to."""
    state: dict[str, str] = gm.meta["state"]
    detached = nodes_without_grad(gm)
    uses: Counter[str] = Counter()
    products = []
    for node in gm.graph.nodes:
        for operand in _operands(node):
            source = parameter_of(operand, detached)
            if source is None or source.name not in state:
                continue
            parameter = state[source.name]
            uses[parameter] += 1
            owner, _, attribute = parameter.rpartition(".")
            consumer = owner if attribute == "weight" else parameter
            if uses[parameter] > 1:
                consumer = f"{consumer}#{uses[parameter]}"
            products.append(Product(consumer, parameter, node, _reason(node), _input_dim(operand, source)))
    return tuple(products)


def _operands(node: Node) -> list[Node]:
    """What a product multiplies, besides the input of a linear or a convolution; nothing for other nodes.

    The matrices that an operator of another library takes count, for what it does with them is not known.
    """
    if node.op != "call_function":
        return []
    operation = operation_of(node)
    if node.target is aten.linear.default or operation.startswith(("conv", "_conv")):
        operands = node.args[1:2]
    elif getattr(node.target, "namespace", "aten") not in ("aten", "velora"):
        operands = tuple(operand for operand in node.all_input_nodes if _is_matrix(operand))  # an unknown operator
    elif operation not in OTHER_PRODUCTS:
        operands = ()
    elif operation.startswith(("add", "badd")):
        operands = node.args[1:3]
    elif operation == "bilinear":
        operands = node.args[:3]
    else:
        operands = tuple(node.all_input_nodes)
    return [operand for operand in operands if isinstance(operand, Node)]


def _input_dim(operand: Node, parameter: Node) -> int | None:
    """1 for a linear's [O, D] weight as it is, 0 for the transpose of a [D, O] weight, None for all else."""
    if len(parameter.users) != 1 or len(operand.users) != 1:
        return None
    if operand is parameter:
        return 1
    return 0 if is_transpose(operand) and operand.args[0] is parameter else None


def _is_matrix(operand: Node) -> bool:
    value = operand.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() >= 2


def _reason(node: Node) -> str | None:
    if node.target is aten.linear.default:
        return None
    return f"it is used by {operation_of(node)}, and only linear layers can be compressed"
