"""The calls that a model makes of its blocks, recorded once and then stood in for while the rest is traced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.fx import GraphModule

from velora_fx.cache_filling import filling_graph
from velora_fx.capture import state_of
from velora_fx.checkpointing import CONTEXTS, Checkpointed
from velora_fx.fake import as_compiled, fake_tensor
from velora_fx.graphs import Call, RegionGraph, find_graph, key_of
from velora_fx.passes.recompute_in_backward import recompute_in_backward
from velora_fx.region import Region, make_call
from velora_fx.regions import find_blocks


@dataclass(frozen=True)
class BlockCall:
    """One call of a block: its name, its graph, its state by the model's names, its projections, how many tensors it
    was given, and what `gm` returned: the outputs of `graph`, and then what it leaves in a key-value cache."""

    name: str
    graph: RegionGraph
    gm: GraphModule
    state: tuple[str, ...]
    projections: tuple[torch.Tensor, ...]
    num_tensors: int
    outputs: tuple[torch.Tensor, ...]
    num_cached: int


def record(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], graphs: Mapping[str, Sequence[RegionGraph]]
) -> list[BlockCall]:
    """Runs a fake model's forward and returns the calls of its blocks and of its regions for which there are graphs."""
    names = {id(tensor): name for name, tensor in state_of(model).items()}
    calls: list[BlockCall] = []
    filling: dict[int, GraphModule] = {}
    recomputing: dict[tuple[int, str], GraphModule] = {}

    def recorded(name: str, block: torch.nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        call = make_call(block, args, kwargs)
        graph, projections = _graph_of(call, forward, graphs.get(name, ()))
        if graph is None or graph.gm is None:
            return forward(*args, **kwargs)
        gm = graph.gm
        outputs = tuple(gm(*call.tensors, *projections))
        result, num_results = graph.result(outputs), len(outputs)
        if isinstance(forward, Checkpointed):
            gm = recomputing.setdefault(
                (id(graph), forward.recompute), recompute_in_backward(gm, CONTEXTS[forward.recompute])
            )
        elif not isinstance(forward, Region) and (caches := _caches_left_out(call, args, kwargs)):
            if id(graph) not in filling:
                filling[id(graph)] = filling_graph(block, args, kwargs, caches)
            gm = filling[id(graph)]
            outputs = tuple(gm(*call.tensors))
        state = tuple(names[id(tensor)] for tensor in call.state.values())
        num_tensors, num_cached = len(call.tensors) - len(state), len(outputs) - num_results
        calls.append(BlockCall(name, graph, gm, state, projections, num_tensors, outputs, num_cached))
        return result

    with _instead_of_blocks(model, recorded), as_compiled():
        model(*args, **kwargs)
    return calls


def _caches_left_out(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    given, passed = [*args, *kwargs.values()], [*call.args, *call.kwargs.values()]
    return [value for value, instead in zip(given, passed, strict=True) if instead is not value]


@contextlib.contextmanager
def replay(
    model: torch.nn.Module, calls: Sequence[BlockCall], outputs: Sequence[torch.Tensor]
) -> Iterator[list[torch.Tensor]]:
    """Has the recorded calls return `outputs`, in order; yields the list of aliases of the tensors they are given."""
    marked: list[torch.Tensor] = []
    expected, returned = iter(calls), iter(outputs)
    upcoming = [next(expected, None)]

    def replayed(name: str, block: torch.nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        call = upcoming[0]
        if call is None or call.name != name:
            return forward(*args, **kwargs)
        upcoming[0] = next(expected, None)
        given = make_call(block, args, kwargs)
        tensors = given.tensors[len(given.state) :]
        if len(tensors) != call.num_tensors:
            raise ValueError(f"{name} is given {len(tensors)} tensors in tracing, and {call.num_tensors} otherwise")
        marked.extend(torch.ops.aten.alias.default(tensor) for tensor in tensors)
        outputs = list(islice(returned, len(call.outputs)))
        return call.graph.result(tuple(outputs[: len(outputs) - call.num_cached]))

    with _instead_of_blocks(model, replayed):
        yield marked


def _graph_of(
    call: Call, forward: Any, graphs: Sequence[RegionGraph]
) -> tuple[RegionGraph | None, tuple[torch.Tensor, ...]]:
    if isinstance(forward, Region):
        graph = forward.graph_for(call)
        if graph is not None and graph.gm is not None:
            first = call.tensors[0]
            placed = forward.placed_on(first.device)
            return graph, tuple(fake_tensor(v, first.fake_mode) for v in placed)  # type: ignore[attr-defined]
    return find_graph(graphs, call, key_of(call), exact=False), ()


@contextlib.contextmanager
def _instead_of_blocks(model: torch.nn.Module, stand_in: Any) -> Iterator[None]:
    """Calls `stand_in(name, block, forward, args, kwargs)` for each call of a block or of a region's module."""
    own = {name: module for name, module in model.named_modules() if isinstance(vars(module).get("forward"), Region)}
    blocks = {**find_blocks(model), **own}
    before = {name: vars(block).get("forward") for name, block in blocks.items()}
    try:
        for name, block in blocks.items():
            block.forward = _StandIn(name, block, block.forward, stand_in)
        yield
    finally:
        for name, block in blocks.items():
            del block.forward
            if before[name] is not None:
                block.forward = before[name]


@dataclass
class _StandIn:
    name: str
    block: torch.nn.Module
    forward: Any
    call: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.name, self.block, self.forward, args, kwargs)
