"""A graph cut where other code is called in its middle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node


@dataclass(frozen=True)
class Segment:
    """A stretch of a graph as a graph of its own, with the names of what it takes from and gives to the whole."""

    gm: GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def cut_at_calls(gm: GraphModule, calls: Sequence[Sequence[Node]], results: Sequence[Node]) -> tuple[Segment, ...]:
    """Cuts a graph where other code is called, in order: one segment more than there are calls.

    Each call is marked by alias nodes of its arguments, which the segments leave out; what the call returns are
    placeholders. `results` are the nodes needed besides. A segment's placeholders that are parameters keep their names
    in `meta["state"]`; the graph itself stays as it is. ValueError for a cut within a grad-mode or autocast stretch.
    """
    markers = {marker: number for number, call in enumerate(calls) for marker in call}
    stretches: list[list[Node]] = [[] for _ in range(len(calls) + 1)]
    reached, opened = 0, 0
    for node in gm.graph.nodes:
        if node in markers:
            if opened:
                raise ValueError(
                    "blocks are called within a no_grad or autocast stretch of the model's forward: enter autocast "
                    "around the model, or use compiled=False"
                )
            reached = markers[node] + 1
        elif node.op == "call_function":
            opened += _opens(node)
            stretches[reached].append(node)
    needed = {*results, *(marker.args[0] for marker in markers)}
    return tuple(_segment(gm, nodes, needed) for nodes in stretches)


def _opens(node: Node) -> int:
    """1 for a node that enters a grad-mode or autocast stretch, -1 for one that leaves it, else 0."""
    if node.target is torch._C._set_grad_enabled:
        return -1 if node.args[0] else 1
    if node.target is torch.amp.autocast_mode._enter_autocast:
        return 1
    return -1 if node.target is torch.amp.autocast_mode._exit_autocast else 0


def _segment(gm: GraphModule, nodes: Sequence[Node], needed: set[Any]) -> Segment:
    inside = set(nodes)
    operands = dict.fromkeys(operand for node in nodes for operand in node.all_input_nodes if operand not in inside)
    inputs = [node for node in operands if node.op != "get_attr"]
    outputs = [node for node in nodes if node in needed or any(user not in inside for user in node.users)]
    outputs = [node for node in outputs if isinstance(node.meta.get("val"), torch.Tensor)]
    graph = Graph()
    values: dict[Node, Node] = {}
    for node in [*inputs, *(node for node in operands if node.op == "get_attr")]:
        values[node] = graph.placeholder(node.name) if node in inputs else graph.get_attr(str(node.target))
        values[node].meta = dict(node.meta)
    for node in nodes:
        values[node] = graph.node_copy(node, lambda old: values[old])
    graph.output(tuple(values[node] for node in outputs))
    segment = GraphModule(gm, graph)
    state: dict[str, str] = gm.meta["state"]
    segment.meta["state"] = {values[node].name: state[node.name] for node in inputs if node.name in state}
    return Segment(segment, tuple(node.name for node in inputs), tuple(node.name for node in outputs))
