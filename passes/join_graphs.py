"""One graph in the place of several that run one after the other."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch.fx import Graph, GraphModule, Node


@dataclass(frozen=True)
class Piece:
    """A graph with the names, among all values, of what it takes and gives.

    `state` gives the parameter or buffer behind its inputs of these numbers.
    """

    gm: GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    state: Mapping[int, str]


def join_graphs(pieces: Sequence[Piece], needed: Collection[str]) -> Piece:
    """The pieces, in order, as one graph that gives those of their outputs that are `needed`.

    Before::

        %h = linear(%x, %weight); return (%h,)        x -> h
        %y = relu(%h); return (%y,)                   h -> y

    After::

        %h = linear(%x, %weight)
        %y = relu(%h)
        return (%y,)                                  x -> y
    """
    graph, attributes = Graph(), dict[str, Any]()
    made = {name for piece in pieces for name in piece.outputs}
    state = {name: piece.state[k] for piece in pieces for k, name in enumerate(piece.inputs) if k in piece.state}
    taken = dict.fromkeys(name for piece in pieces for name in piece.inputs if name not in made)
    inputs = [*(name for name in taken if name in state), *(name for name in taken if name not in state)]
    values = {name: graph.placeholder(name) for name in inputs}
    for number, piece in enumerate(pieces):
        copied: dict[Node, Node] = {}
        for node, name in zip(piece.gm.graph.find_nodes(op="placeholder"), piece.inputs, strict=True):
            copied[node] = values[name]
            values[name].meta = values[name].meta or dict(node.meta)
        for node in piece.gm.graph.nodes:
            if node.op == "get_attr":
                target = f"piece_{number}_{node.target}".replace(".", "_")
                attributes[target] = attrgetter(node.target)(piece.gm)
                copied[node] = graph.get_attr(target)
            elif node.op == "call_function":
                copied[node] = graph.node_copy(node, copied.__getitem__)
        results: Any = piece.gm.graph.output_node().args[0]
        values.update({name: copied[node] for name, node in zip(piece.outputs, results, strict=True)})
    outputs = tuple(name for piece in pieces for name in piece.outputs if name in needed)
    graph.output(tuple(values[name] for name in outputs))
    joined = GraphModule(attributes, graph)
    joined.meta["state"] = {values[name].name: state[name] for name in inputs if name in state}
    return Piece(joined, tuple(inputs), outputs, {k: state[name] for k, name in enumerate(inputs) if name in state})
