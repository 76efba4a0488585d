"""Grad-mode and autocast stretches as explicit state nodes."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch.fx import GraphModule, Node


def inline_state_regions(gm: GraphModule) -> GraphModule:
    """Replaces every wrapped grad-mode or autocast body by its nodes between nodes that set and reset the state.

    Dynamo cannot re-trace the wrapped bodies with symbolic shapes, and a body inlined without its state would let
    gradients flow out of a `no_grad` stretch.

    Before::

        %y = wrap_with_set_grad_enabled(False, %submod_0, %x)

    After::

        torch._C._set_grad_enabled(False)
        %y = ... the body of submod_0 ...
        torch._C._set_grad_enabled(True)
    """
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.wrap_with_set_grad_enabled):
        enabled, body, *inputs = node.args
        with gm.graph.inserting_before(node):
            gm.graph.call_function(torch._C._set_grad_enabled, (enabled,))
            outputs = _inline(gm, body, inputs)
            gm.graph.call_function(torch._C._set_grad_enabled, (not enabled,))
        _replace_outputs(gm, node, body, outputs)
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.wrap_with_autocast):
        device_type, dtype, enabled, cache_enabled, body, *inputs = node.args
        with gm.graph.inserting_before(node):
            state = device_type, dtype, enabled, cache_enabled
            mode = gm.graph.call_function(torch.amp.autocast_mode._enter_autocast, state)
            outputs = _inline(gm, body, inputs)
            gm.graph.call_function(torch.amp.autocast_mode._exit_autocast, (mode,))
        _replace_outputs(gm, node, body, outputs)
    return gm


def _inline(gm: GraphModule, wrapped: Node, inputs: Sequence[Any]) -> Any:
    """Copies the nodes of a wrapped body to where nodes are inserted now; returns its outputs."""
    body = gm.get_submodule(str(wrapped.target))
    assert isinstance(body, GraphModule)
    inline_state_regions(body)
    values: dict[Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), inputs, strict=True))
    for node in body.graph.nodes:
        if node.op == "get_attr":
            name = f"_inlined_{len(gm.graph.nodes)}"
            setattr(gm, name, attrgetter(node.target)(body))
            values[node] = gm.graph.get_attr(name)
        elif node.op == "call_function":
            values[node] = gm.graph.node_copy(node, values.__getitem__)
    return torch.fx.map_arg(body.graph.output_node().args[0], values.__getitem__)


def _replace_outputs(gm: GraphModule, node: Node, body: Any, outputs: Any) -> None:
    for user in list(node.users):
        user.replace_all_uses_with(outputs[user.args[1]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)
    if not body.users:
        gm.graph.erase_node(body)
        gm.delete_submodule(str(body.target))
