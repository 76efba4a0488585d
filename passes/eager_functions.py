"""The graph of a region as it runs eagerly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional as F

from velora_fx.ops import velora

aten = torch.ops.aten
# The same operators by functions with the same arguments, which parse these sooner. The first is a tensor, or tensors.
DIRECT: Mapping[Any, Callable[..., Any]] = {
    **velora.FUNCTIONS,
    aten.add.Tensor: torch.add,
    aten.cat.default: torch.cat,
    aten.contiguous.default: Tensor.contiguous,
    aten.div.Tensor: torch.div,
    aten.dropout.default: torch.dropout,
    aten.gelu.default: F.gelu,
    aten.layer_norm.default: torch.layer_norm,
    aten.linear.default: F.linear,
    aten.mean.dim: torch.mean,
    aten.mul.Tensor: torch.mul,
    aten.neg.default: torch.neg,
    aten.permute.default: torch.permute,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.relu.default: torch.relu,
    aten.reshape.default: torch.reshape,
    aten.rsqrt.default: torch.rsqrt,
    aten.scaled_dot_product_attention.default: F.scaled_dot_product_attention,
    aten.silu.default: torch._C._nn.silu,
    aten.sym_size.int: Tensor.size,
    aten.to.dtype: Tensor.to,
    aten.transpose.int: torch.transpose,
    aten.type_as.default: Tensor.type_as,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.view.default: Tensor.view,
}


def for_eager(gm: GraphModule) -> GraphModule:
    """A copy of a graph, which stays as it is, with functions in the place of operators.

    They do the same and cost less; it runs where nothing follows its inputs (`velora_fx.ops.velora.is_followed`).
    A linear makes the projections that it alone takes.

    Before::

        %z = velora.compress.default(%x, %projection_0)
        %y = velora.linear.default(%x, %weight, %bias, %z, %projection_0, None)
        %h = aten.gelu.default(%y)

    After::

        %y = velora_fx.ops.velora._linear(%x, %weight, %bias, None, %projection_0, None)
        %h = torch._C._nn.gelu(%y)
    """
    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    for node in graph.find_nodes(op="call_function", target=torch.ops.velora.compress.default):
        if len(node.users) == 1:
            next(iter(node.users)).update_arg(3, None)
            graph.erase_node(node)
    for node in graph.nodes:
        if node.args and isinstance(node.args[0], (Node, list)):
            node.target = DIRECT.get(node.target, node.target)
    eager = GraphModule(gm, graph)
    eager.meta = dict(gm.meta)
    return eager
