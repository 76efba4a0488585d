"""One form for every matrix product with a parameter."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import Argument

aten = torch.ops.aten
TRANSPOSES = (aten.t.default, aten.numpy_T.default, aten.transpose.int)
PRODUCTS = (aten.mm.default, aten.matmul.default)


def canonicalize(gm: GraphModule) -> GraphModule:
    """Writes `addmm`, `mm` and `matmul` with a parameter operand as `linear`, and drops metadata assertions.

    The kernels that run are the same ones: `linear` of a transposed view is `addmm` of the original.

    Before::

        %y = addmm(%bias, %x, %weight)

    After::

        %t = t(%weight)
        %y = linear(%x, %t, %bias)
    """
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten._assert_tensor_metadata.default:
            gm.graph.erase_node(node)
        elif node.target is aten.addmm.default and not node.kwargs:
            bias, x, weight = node.args
            _as_linear(gm, node, x, weight, bias)
        elif node.target in PRODUCTS:
            x, weight = node.args
            _as_linear(gm, node, x, weight, None)
    return gm


def parameter_of(node: object) -> Node | None:
    """The placeholder that a weight operand is a view or a cast of, or None if it is computed otherwise."""
    views = (
        *TRANSPOSES, aten.permute.default, aten.view.default, aten.reshape.default, aten.contiguous.default,
        aten.alias.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default,
        aten.slice.Tensor, aten.select.int, aten.squeeze.default, aten.unsqueeze.default, aten.expand.default,
        aten.clone.default,
    )  # fmt: skip
    while isinstance(node, Node) and node.op == "call_function" and node.target in views:
        node = node.args[0]
    return node if isinstance(node, Node) and node.op == "placeholder" else None


def _as_linear(gm: GraphModule, node: Node, x: Argument, weight: Argument, bias: Argument) -> None:
    if not (isinstance(weight, Node) and isinstance(x, Node)) or not _is_matrix_of_parameter(gm, weight):
        return
    with gm.graph.inserting_before(node):
        transposed: Argument = (
            weight.args[0] if _is_transpose(weight) else gm.graph.call_function(aten.t.default, (weight,))
        )
        args: tuple[Argument, ...] = (x, transposed) if bias is None else (x, transposed, bias)
        linear = gm.graph.call_function(aten.linear.default, args)
    linear.meta = dict(node.meta)
    node.replace_all_uses_with(linear)
    gm.graph.erase_node(node)
    if not weight.users:
        gm.graph.erase_node(weight)


def _is_matrix_of_parameter(gm: GraphModule, weight: Node) -> bool:
    value = weight.meta.get("val")
    state = gm.meta.get("state", ())
    source = parameter_of(weight)
    return isinstance(value, torch.Tensor) and value.dim() == 2 and source is not None and source.name in state


def _is_transpose(node: Node) -> bool:
    if node.target not in TRANSPOSES:
        return False
    return node.target is not aten.transpose.int or set(node.args[1:]) in ({0, 1}, {-1, -2}, {0, -1}, {1, -2})
