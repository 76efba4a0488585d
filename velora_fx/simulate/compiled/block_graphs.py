"""The graph of a block's call as a compiler gets it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from velora_fx.capture import (
    Call,
    Captured,
    Checkpoint,
    ContextFn,
    RegionGraph,
    carriers_of,
    find_graph,
    has_replaced_forwards,
    key_of,
    make_graph,
    merge_graph,
)
from velora_fx.passes.recompute_in_backward import recompute_in_backward
from velora_fx.runtime import CONTEXTS, Checkpointed, Region, make_call
from velora_fx.simulate import fake_tensor
from velora_fx.simulate.compiled.cache_filling import filling_graph
from velora_fx.simulate.compiled.inductor import describe


@dataclass(frozen=True)
class FoundGraph:
    """The graph of a call, the graph `gm` as it is compiled, and what `gm` takes last: carriers by name, projections.

    The two differ where the block fills a key-value cache, which `gm` returns last, and where it is checkpointed.
    """

    call: Call
    graph: RegionGraph
    gm: GraphModule
    carriers: Mapping[str, torch.Tensor]
    projections: tuple[torch.Tensor, ...]
    plain: GraphModule
    caches: Sequence[Any] = ()

    @property
    def inputs(self) -> list[torch.Tensor]:
        """All that `gm` takes."""
        return [*self.call.tensors, *self.carriers.values(), *self.projections]

    @property
    def captured(self) -> Captured:
        """What was captured for the graph."""
        assert self.graph.captured is not None
        return self.graph.captured


class BlockGraphs:
    """Finds the graphs of the calls of blocks among `graphs` and, where regions are installed, theirs."""

    def __init__(self, graphs: Mapping[str, Sequence[RegionGraph]]) -> None:
        self.graphs = graphs
        self._filling: dict[int, GraphModule] = {}
        self._library: list[RegionGraph] = []
        self._outputs: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self._recomputing: dict[tuple[int, ContextFn | None], GraphModule] = {}

    def find(
        self,
        name: str,
        block: torch.nn.Module,
        forward: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        checkpoints: Sequence[Checkpoint],
        captures: bool = False,
    ) -> FoundGraph | None:
        """The graph of a call within the given checkpoints, the innermost last; None if there is none.

        With `captures` an untouched block that is called in a new way gets one.
        """
        call = make_call(block, args, kwargs)
        graph: RegionGraph | None = None
        carriers: Mapping[str, torch.Tensor] = {}
        projections: tuple[torch.Tensor, ...] = ()
        region = forward.previous if isinstance(forward, Checkpointed) else forward
        if isinstance(region, Region):
            graph = region.graph_for(call, key_of(call))
            if graph is not None and graph.gm is not None:
                own = carriers_of(block)
                carriers = {carrier: own[carrier] for carrier in region.carriers}
                projections = _fakes(region.placed_on(call.tensors[0].device), call.tensors[0])
        if graph is None or graph.gm is None:
            graph = find_graph(self.graphs.get(name, ()), call, key_of(call), exact=False)
            if graph is None and captures and not isinstance(region, Region):
                graph = self._captured(call)
        if graph is None or graph.gm is None:
            return None
        plain = gm = graph.gm
        caches: list[Any] = []
        contexts = [checkpoint.context_fn for checkpoint in (*checkpoints, graph.checkpoint) if checkpoint is not None]
        if isinstance(forward, Checkpointed):
            contexts = [CONTEXTS[forward.recompute]]
        if contexts:
            key = id(graph), contexts[-1]
            if key not in self._recomputing:
                self._recomputing[key] = recompute_in_backward(gm, contexts[-1])
            gm = self._recomputing[key]
        elif not projections and (caches := _caches_left_out(call, args, kwargs)):
            if id(graph) not in self._filling:
                self._filling[id(graph)] = filling_graph(block, args, kwargs, caches)
            plain = gm = self._filling[id(graph)]
        return FoundGraph(call, graph, gm, carriers, projections, plain, caches)

    def outputs(self, found: FoundGraph) -> tuple[Any, ...]:
        """What the graph returns, run operator by operator; of equal calls only the first is, the others get the like.

        None is like a view of an input or of another output.
        """
        inputs = found.inputs
        key = id(found.plain), *(describe(tensor) for tensor in inputs)
        if key in self._outputs:
            return tuple(_like(tensor) for tensor in self._outputs[key])
        outputs = tuple(found.plain(*inputs))
        storages = [tensor.untyped_storage()._cdata for tensor in outputs]
        if len({*storages} - {tensor.untyped_storage()._cdata for tensor in inputs}) == len(outputs):
            self._outputs[key] = outputs
        return outputs

    def _captured(self, call: Call) -> RegionGraph:
        """A new graph, or one that was captured for an equal block."""
        if has_replaced_forwards(call.module):  # equal keys are no equal blocks then
            return make_graph(call, key_of(call))
        graph = find_graph(self._library, call, key_of(call), exact=True)
        if graph is None:
            graph = merge_graph(self._library, make_graph(call, key_of(call)))
            self._library.append(graph)
        return graph


def _like(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.new_empty_strided(tensor.shape, tensor.stride()).requires_grad_(tensor.requires_grad)


def _fakes(tensors: Sequence[torch.Tensor], like: Any) -> tuple[torch.Tensor, ...]:
    return tuple(fake_tensor(tensor, like.fake_mode) for tensor in tensors)


def _caches_left_out(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    given, passed = [*args, *kwargs.values()], [*call.args, *call.kwargs.values()]
    return [value for value, instead in zip(given, passed, strict=True) if instead is not value]
