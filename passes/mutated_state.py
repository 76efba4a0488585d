"""The parameters and buffers that a graph changes."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node


def mutated_state(gm: GraphModule) -> tuple[str, ...]:
    """The dotted names of the parameters and buffers that are written in place, directly or through a view."""
    state: dict[str, str] = gm.meta["state"]
    found = []
    for node in gm.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Node):
                source = _viewed(value)
                if source.name in state:
                    found.append(state[source.name])
    return tuple(dict.fromkeys(found))


def _viewed(node: Node) -> Node:
    """The tensor that a chain of views and in-place operations starts from."""
    while isinstance(node.target, torch._ops.OpOverload) and node.args and isinstance(node.args[0], Node):
        returned = node.target._schema.returns
        if not (returned and returned[0].alias_info is not None):
            break
        node = node.args[0]
    return node
