"""The graph of a region as it runs eagerly."""

from __future__ import annotations

from torch.fx import Graph, GraphModule

from velora_fx.ops import velora


def for_eager(gm: GraphModule) -> GraphModule:
    """A copy of a graph, which stays as it is, with functions in the place of VeLoRA's operators.

    They do the same and cost less; it runs where nothing follows its inputs (`velora_fx.ops.velora.is_followed`).

    Before::

        %z = velora.compress.default(%x, %projection_0)

    After::

        %z = velora_fx.ops.velora._compress(%x, %projection_0)
    """
    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    for node in graph.nodes:
        node.target = velora.FUNCTIONS.get(node.target, node.target)
    return GraphModule(gm, graph)
