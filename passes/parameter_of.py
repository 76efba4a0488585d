"""The parameter that a weight operand is made from."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.fx import GraphModule, Node

# Names of operations whose result is a part, a view, a cast or a copy of their first operand.
VIEWS = frozenset({
    "t", "numpy_T", "mT", "matrix_H", "adjoint", "transpose", "swapaxes", "swapdims", "permute", "movedim",
    "moveaxis", "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "contiguous", "alias", "to",
    "type_as", "_to_copy", "clone", "slice", "select", "narrow", "squeeze", "unsqueeze", "expand", "expand_as",
    "chunk", "split", "split_with_sizes", "tensor_split", "unbind", "getitem", "index", "index_select",
})  # fmt: skip

# Names of operations that transpose a matrix; the last three take two dimensions, which may be one and the same.
TRANSPOSES = ("t", "numpy_T", "mT", "transpose", "swapaxes", "swapdims")


def parameter_of(operand: object, detached: Collection[Node]) -> Node | None:
    """The placeholder that an operand is a view, a part, a cast or a copy of; None if it is computed otherwise.

    None too where it is made by a node in `detached`, the nodes that `nodes_without_grad` finds.
    """
    node = operand
    while isinstance(node, Node) and node.op == "call_function":
        if operation_of(node) not in VIEWS or node in detached:
            return None
        node = node.args[0]
    return node if isinstance(node, Node) and node.op == "placeholder" else None


def operation_of(node: Node) -> str:
    """The name of the operation of a node, without namespace and overload."""
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]


def is_transpose(node: Node) -> bool:
    """True for a node that transposes a matrix."""
    dims = node.args[1:]
    return operation_of(node) in TRANSPOSES and (
        not dims or {dim % 2 for dim in dims if isinstance(dim, int)} == {0, 1}
    )


def nodes_without_grad(gm: GraphModule) -> frozenset[Node]:
    """The nodes within `no_grad` stretches."""
    enabled, found = True, []
    for node in gm.graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        elif not enabled:
            found.append(node)
    return frozenset(found)
