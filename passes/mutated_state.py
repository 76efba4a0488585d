"""The parameters and buffers that a graph changes."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

aten = torch.ops.aten
# Operators that write the running statistics they are given, which their schemas do not say.
HIDDEN_WRITES = (aten.batch_norm.default, aten.instance_norm.default, aten.native_batch_norm.default)


def mutated_state(gm: GraphModule) -> tuple[str, ...]:
    """The dotted names of the parameters and buffers that are written in place, directly or through a view."""
    state: dict[str, str] = gm.meta["state"]
    written = [source.name for node in gm.graph.nodes for source in map(_viewed, _writes(node))]
    return tuple(dict.fromkeys(state[name] for name in written if name in state))


def _writes(node: Node) -> list[Node]:
    """The operands that a node writes to."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    if node.target in HIDDEN_WRITES:
        return [operand for operand in node.args[3:5] if isinstance(operand, Node)]
    arguments = node.target._schema.arguments
    given = {**dict(zip((a.name for a in arguments), node.args, strict=False)), **node.kwargs}  # also `out=`
    written = (given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write)
    return [value for value in written if isinstance(value, Node)]


def _viewed(node: Node) -> Node:
    """The tensor that a chain of views and in-place operations starts from."""
    while isinstance(node.target, torch._ops.OpOverload) and node.args and isinstance(node.args[0], Node):
        returned = node.target._schema.returns
        if not (returned and returned[0].alias_info is not None):
            break
        node = node.args[0]
    return node
