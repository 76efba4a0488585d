"""One form for every matrix product with a parameter."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import Argument

from velora_fx.passes.parameter_of import is_transpose, nodes_without_grad, parameter_of

aten = torch.ops.aten
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
    detached = nodes_without_grad(gm)
    for node in list(gm.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            gm.graph.erase_node(node)
            continue
        x, weight, bias = _operands(node)
        if isinstance(x, Node) and isinstance(weight, Node) and _is_matrix_of_parameter(gm, weight, detached):
            _as_linear(gm, node, x, weight, bias)
    return gm


def _operands(node: Node) -> tuple[Argument, Argument, Argument]:
    """The input, the weight and the bias of what can be a `linear`; all None of what cannot."""
    if node.target is aten.addmm.default and not node.kwargs:
        bias, x, weight = node.args
        return (x, weight, bias) if _is_bias(bias, node) else (None, None, None)
    if node.target in PRODUCTS:
        x, weight = node.args
        return x, weight, None
    return None, None, None


def _as_linear(gm: GraphModule, node: Node, x: Node, weight: Node, bias: Argument) -> None:
    with gm.graph.inserting_before(node):
        transposed: Argument = (
            weight.args[0] if is_transpose(weight) else gm.graph.call_function(aten.t.default, (weight,))
        )
        args: tuple[Argument, ...] = (x, transposed) if bias is None else (x, transposed, bias)
        linear = gm.graph.call_function(aten.linear.default, args)
    linear.meta = dict(node.meta)
    node.replace_all_uses_with(linear)
    gm.graph.erase_node(node)
    if not weight.users:
        gm.graph.erase_node(weight)


def _is_matrix_of_parameter(gm: GraphModule, weight: Node, detached: Collection[Node]) -> bool:
    value = weight.meta.get("val")
    state = gm.meta.get("state", ())
    source = parameter_of(weight, detached)
    return isinstance(value, torch.Tensor) and value.dim() == 2 and source is not None and source.name in state


def _is_bias(bias: Argument, product: Node) -> bool:
    """One number for each column: `addmm` takes any tensor that can be broadcast."""
    value = bias.meta.get("val") if isinstance(bias, Node) else None
    return isinstance(value, torch.Tensor) and value.shape == product.meta["val"].shape[1:]
