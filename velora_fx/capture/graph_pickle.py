"""FX graphs as data that pickles.

A GraphModule pickles as source code and traces it again when loaded; grad-mode and autocast nodes take no tensors, so
tracing would run them instead of recording them.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate, map_arg


@dataclass(frozen=True)
class NodeName:
    """Stands for a node among the arguments of another."""

    name: str


@dataclass(frozen=True)
class GraphData:
    """A graph's nodes as (op, name, target, args, kwargs), the tensors it holds, and its state placeholders."""

    nodes: tuple[tuple[str, str, Any, Any, Any], ...]
    attributes: dict[str, Any]
    state: dict[str, str]


def graph_to_data(gm: GraphModule) -> GraphData:
    """Takes a graph apart; operators are kept by name."""
    nodes = tuple(
        (
            node.op,
            node.name,
            str(node.target) if isinstance(node.target, torch._ops.OpOverload) else node.target,
            *map_arg((node.args, node.kwargs), _name_of),
        )
        for node in gm.graph.nodes
    )
    attributes = {str(node.target): getattr(gm, str(node.target)) for node in gm.graph.nodes if node.op == "get_attr"}
    return GraphData(nodes, attributes, dict(gm.meta["state"]))


def graph_from_data(data: GraphData) -> GraphModule:
    """Puts together what `graph_to_data` took apart."""
    graph = Graph()
    made: dict[str, Node] = {}

    def node_of(value: Any) -> Any:
        return made[value.name] if isinstance(value, NodeName) else value

    for op, name, target, args, kwargs in data.nodes:
        if op == "call_function" and isinstance(target, str):
            target = attrgetter(target)(torch.ops)
        made[name] = graph.create_node(op, target, *map_aggregate((args, kwargs), node_of), name)
    gm = GraphModule(data.attributes, graph)
    gm.meta["state"] = dict(data.state)
    return gm


def _name_of(node: Node) -> Any:
    return NodeName(node.name)
