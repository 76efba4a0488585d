"""A graph whose compiled backward recomputes what it does not keep."""

from __future__ import annotations

import copy
from collections.abc import Callable
from operator import getitem
from typing import Any

import torch
from torch.fx import Graph, GraphModule


def recompute_in_backward(gm: GraphModule, context_fn: Callable[[], Any] | None) -> GraphModule:
    """The graph inside of one `tag_activation_checkpoint`, the node that Dynamo makes of `torch.utils.checkpoint`.

    `context_fn` is the one given to `checkpoint`, None for its default, which keeps nothing.

    Before::

        %y = linear(%x, %weight)
        return (relu(%y),)

    After::

        %body = get_attr[target=body]
        %outputs = tag_activation_checkpoint(%body, %weight, %x, use_reentrant=False)
        return (getitem(%outputs, 0),)
    """
    body_gm = copy.deepcopy(gm)
    if context_fn is not None:
        body_gm.meta["_checkpoint_context_fn"] = context_fn
    graph = Graph()
    inputs = []
    for node in gm.graph.find_nodes(op="placeholder"):
        inputs.append(graph.placeholder(node.name))
        inputs[-1].meta = dict(node.meta)
    body = graph.get_attr("body")
    results: Any = gm.graph.output_node().args[0]
    operator = torch.ops.higher_order.tag_activation_checkpoint
    outputs = graph.call_function(operator, (body, *inputs), {"use_reentrant": False, "preserve_rng_state": True})
    graph.output(tuple(graph.call_function(getitem, (outputs, number)) for number in range(len(results))))
    whole = GraphModule({"body": body_gm}, graph)
    whole.meta["state"] = dict(gm.meta["state"])
    return whole
