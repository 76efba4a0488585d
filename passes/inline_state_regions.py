"""Grad-mode and autocast stretches as explicit state nodes."""

from __future__ import annotations

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
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
            enabled, body, *inputs = node.args
            with gm.graph.inserting_before(node):
                gm.graph.call_function(torch._C._set_grad_enabled, (enabled,))
                outputs = _inline(gm, _submodule(gm, body), inputs)
                gm.graph.call_function(torch._C._set_grad_enabled, (not enabled,))
            _replace_outputs(gm, node, body, outputs)
        elif node.target is torch.ops.higher_order.wrap_with_autocast:
            device_type, dtype, enabled, cache_enabled, body, *inputs = node.args
            with gm.graph.inserting_before(node):
                mode = gm.graph.call_function(
                    torch.amp.autocast_mode._enter_autocast, (device_type, dtype, enabled, cache_enabled)
                )
                outputs = _inline(gm, _submodule(gm, body), inputs)
                gm.graph.call_function(torch.amp.autocast_mode._exit_autocast, (mode,))
            _replace_outputs(gm, node, body, outputs)
    return gm


def is_state_node(node: Node) -> bool:
    """True for the nodes that set grad mode or autocast: nothing may be moved across them."""
    return node.target in (
        torch._C._set_grad_enabled,
        torch.amp.autocast_mode._enter_autocast,
        torch.amp.autocast_mode._exit_autocast,
    )


def _submodule(gm: GraphModule, body: Node) -> GraphModule:
    submodule = gm.get_submodule(str(body.target))
    assert isinstance(submodule, GraphModule)
    return inline_state_regions(submodule)


def _inline(gm: GraphModule, body: GraphModule, inputs: list[Any]) -> Any:
    values: dict[Node, Any] = {}
    placeholders = [node for node in body.graph.nodes if node.op == "placeholder"]
    values.update(zip(placeholders, inputs, strict=True))
    for node in body.graph.nodes:
        if node.op == "get_attr":
            name = f"_inlined_{len(list(gm.graph.nodes))}"
            setattr(gm, name, _attribute(body, str(node.target)))
            values[node] = gm.graph.get_attr(name)
        elif node.op == "call_function":
            values[node] = gm.graph.node_copy(node, lambda old: values[old])
        elif node.op == "output":
            return torch.fx.map_arg(node.args[0], lambda old: values[old])
    raise AssertionError("a graph without an output node")


def _attribute(module: torch.nn.Module, dotted: str) -> Any:
    value: Any = module
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def _replace_outputs(gm: GraphModule, node: Node, body: Any, outputs: Any) -> None:
    for user in list(node.users):
        user.replace_all_uses_with(outputs[user.args[1]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)
    if not body.users:
        gm.graph.erase_node(body)
        gm.delete_submodule(str(body.target))
