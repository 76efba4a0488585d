"""What equal blocks would each compute from the same tensors, as a graph of its own that runs once."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
# Inputs of these are in memory, where others fuse what makes theirs.
TAKE_BUFFERS = (ATTENTION, aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default)


@dataclass(frozen=True)
class Hoisted:
    """`shared` computes from the placeholders of numbers `inputs` what the last placeholders of `rest` stand for."""

    shared: GraphModule
    inputs: tuple[int, ...]
    rest: GraphModule


def hoist_shared(gm: GraphModule, given: Collection[int]) -> Hoisted | None:
    """Takes out what matrix products and attention are given that is made of the placeholders of numbers `given` alone.

    Compiled as a part of a larger graph such values are computed once for all blocks, since equal expressions are
    merged there. Attention makes of a mask of booleans one of its dtype. None where there is nothing; the graph itself
    stays as it is.

    Before::

        %mask, %q, %weight = placeholders
        %y = scaled_dot_product_attention(%q, %q, %q, %mask)

    After, `shared` and `rest`::

        %added = masked_fill(zeros_like(%mask), logical_not(%mask), -inf)

        %mask, %q, %weight, %shared_0 = placeholders
        %y = scaled_dot_product_attention(%q, %q, %q, %shared_0)
    """
    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    placeholders = graph.find_nodes(op="placeholder")
    made_of = {placeholders[number] for number in given}
    _with_added_masks(graph, made_of)
    shared = _made_of(graph, made_of)
    frontier = _frontier(graph, shared)
    if not frontier:
        return None
    inputs = [number for number in sorted(given) if _reaches(placeholders[number], frontier, shared)]
    made = _graph_of(gm, [placeholders[number] for number in inputs], frontier, shared)
    with graph.inserting_after(placeholders[-1]):
        for number, node in reversed(list(enumerate(frontier))):
            placeholder = graph.placeholder(f"shared_{number}")
            placeholder.meta = dict(node.meta)
            node.replace_all_uses_with(placeholder)
    for node in reversed(graph.nodes):
        if node in shared and node.op == "call_function" and not node.users:
            graph.erase_node(node)
    rest = GraphModule(gm, graph)
    rest.meta = dict(gm.meta)
    return Hoisted(made, tuple(inputs), rest)


def _frontier(graph: Graph, shared: Collection[Node]) -> list[Node]:
    """What is computed in `shared` of which the rest takes buffers."""
    takers = [node for node in graph.nodes if node.target in TAKE_BUFFERS and node not in shared]
    wanted = {_base(operand) for node in takers for operand in node.all_input_nodes if operand in shared}
    return [node for node in graph.nodes if node in wanted and node.op == "call_function"]


def _with_added_masks(graph: Graph, given: set[Node]) -> None:
    """Writes out what attention does with a mask of booleans."""
    shared = _made_of(graph, given)
    for node in graph.find_nodes(op="call_function", target=ATTENTION):
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        if mask not in shared or mask.meta["val"].dtype != torch.bool:
            continue
        with graph.inserting_before(node):
            zeros = graph.call_function(aten.zeros_like.default, (mask,), {"dtype": node.args[2].meta["val"].dtype})
            masked = graph.call_function(aten.logical_not.default, (mask,))
            added = graph.call_function(aten.masked_fill.Scalar, (zeros, masked, float("-inf")))
        node.replace_input_with(mask, added)


def _made_of(graph: Graph, given: set[Node]) -> set[Node]:
    """The nodes that depend on nothing else, and would be the same whenever they run."""
    found = set(given)
    for node in graph.nodes:
        operands = node.all_input_nodes
        if node.op == "call_function" and operands and found.issuperset(operands) and _is_pure(node.target):
            found.add(node)
    return found


def _is_pure(target: Any) -> bool:
    is_operator = isinstance(target, torch._ops.OpOverload)
    return is_operator and not (target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags)


def _base(node: Node) -> Node:
    """What a view is one of."""
    while node.op == "call_function" and getattr(node.target, "is_view", False):
        node = node.all_input_nodes[0]
    return node


def _reaches(node: Node, ends: Collection[Node], inside: Collection[Node]) -> bool:
    return any(user in ends or (user in inside and _reaches(user, ends, inside)) for user in node.users)


def _graph_of(gm: GraphModule, inputs: list[Node], outputs: list[Node], nodes: Collection[Node]) -> GraphModule:
    graph = Graph()
    copied = {node: graph.node_copy(node) for node in inputs}
    for node in outputs[0].graph.nodes:
        if node in nodes and node not in copied and (node in outputs or _reaches(node, outputs, nodes)):
            copied[node] = graph.node_copy(node, lambda old: copied[old])
    graph.output(tuple(copied[node] for node in outputs))
    return GraphModule(gm, graph)
