"""The calls that a model makes of its repeated blocks, recorded once and then left out of a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.fx import GraphModule

from velora_fx.capture import (
    CaptureError,
    LeftOut,
    RegionGraph,
    carriers_of,
    find_blocks,
    inlined_checkpoints,
    state_of,
)
from velora_fx.runtime import make_call
from velora_fx.simulate import as_compiled
from velora_fx.simulate.compiled.block_graphs import BlockGraphs

MOST_JOINED = 12  # calls of blocks: a larger graph takes a compiler minutes


@dataclass(frozen=True)
class BlockCall:
    """One call of a block: its name, its graph, its state and carriers by the model's names, its projections, how many
    tensors it was given, and what `gm` returned: the outputs of `graph`, and then what it leaves in a key-value cache.

    Both graphs are None for a call that none stands for.
    """

    name: str
    graph: RegionGraph | None = None
    gm: GraphModule | None = None
    state: tuple[str, ...] = ()
    carriers: tuple[str, ...] = ()
    projections: tuple[torch.Tensor, ...] = ()
    num_tensors: int = 0
    outputs: tuple[torch.Tensor, ...] = ()
    num_cached: int = 0


def record(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    graphs: Mapping[str, Sequence[RegionGraph]],
    passed_by: Collection[str] = (),
) -> list[BlockCall]:
    """Runs a fake model's forward and returns the calls of its blocks, with their graphs in `graphs` or, where regions
    are installed, those of the regions. `passed_by` is as in `find_blocks`."""
    names = {id(tensor): name for name, tensor in {**state_of(model), **carriers_of(model)}.items()}
    calls: list[BlockCall] = []
    block_graphs = BlockGraphs(graphs)

    def recorded(name: str, block: torch.nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(block, LeftOut):
            return forward(*args, **kwargs)
        found = block_graphs.find(name, block, forward, args, kwargs, checkpoints)
        if found is None:
            calls.append(BlockCall(name))
            return forward(*args, **kwargs)
        outputs = block_graphs.outputs(found)
        num_results = len(found.captured.slots)
        state = tuple(names[id(tensor)] for tensor in found.call.state.values())
        carriers = tuple(names[id(tensor)] for tensor in found.carriers.values())
        num_tensors, num_cached = len(found.call.tensors) - len(state), len(outputs) - num_results
        returned = num_tensors, outputs, num_cached
        calls.append(BlockCall(name, found.graph, found.gm, state, carriers, found.projections, *returned))
        return found.graph.result(outputs[:num_results])

    with inlined_checkpoints() as checkpoints, instead_of_blocks(model, passed_by, recorded), as_compiled():
        model(*args, **kwargs)
    return calls


def inner_calls(calls: Sequence[BlockCall]) -> frozenset[int]:
    """The numbers of the calls to compile apart where the truth is asked for: none of up to MOST_JOINED, as
    `torch.compile` has it, else all but the first and the last.

    These two are compiled with what surrounds them: there the peaks of a step are. Of more calls the graph would take a
    compiler minutes, where of equal blocks apart one is compiled.
    """
    return frozenset() if len(calls) <= MOST_JOINED else but_the_ends(calls)


def but_the_ends(calls: Sequence[BlockCall]) -> frozenset[int]:
    """All with graphs but for the first and the last."""
    return frozenset(number for number in range(1, len(calls) - 1) if calls[number].gm is not None)


def all_calls(calls: Sequence[BlockCall]) -> frozenset[int]:
    """Each apart: what a graph keeps belongs to one block then, and each kind of block is compiled once."""
    return frozenset(range(len(calls)))


@contextlib.contextmanager
def replay(
    model: torch.nn.Module,
    calls: Sequence[BlockCall],
    outputs: Sequence[torch.Tensor],
    passed_by: Collection[str] = (),
) -> Iterator[list[torch.Tensor]]:
    """Has the calls that have graphs return `outputs`, in order; yields the aliases of the tensors they are given.

    The other calls run as they are. CaptureError where something else than calls with graphs is checkpointed.
    """
    marked: list[torch.Tensor] = []
    recorded, returned = iter(calls), iter(outputs)
    unchecked: list[str] = []  # calls with graphs since the last checkpoint ended

    def check() -> None:
        if not unchecked:
            raise CaptureError("its forward checkpoints something else than its repeated blocks")
        unchecked.clear()

    def replayed(name: str, block: torch.nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(block, LeftOut):
            unchecked[:] = [name] if checkpoints else []
            return forward(*args, **kwargs)
        call = next(recorded, BlockCall("nothing"))
        if call.name != name:
            raise CaptureError(f"{name} is called in tracing where otherwise {call.name} is")
        if call.graph is None:
            return forward(*args, **kwargs)
        unchecked[:] = [name] if checkpoints else []
        given = make_call(block, args, kwargs)
        tensors = given.tensors[len(given.state) :]
        if len(tensors) != call.num_tensors:
            raise CaptureError(f"{name} is given {len(tensors)} tensors in tracing, and {call.num_tensors} otherwise")
        marked.extend(torch.ops.aten.alias.default(tensor) for tensor in tensors)
        outputs = list(islice(returned, len(call.outputs)))
        return call.graph.result(tuple(outputs[: len(outputs) - call.num_cached]))

    with inlined_checkpoints(check) as checkpoints, instead_of_blocks(model, passed_by, replayed):
        yield marked


@contextlib.contextmanager
def instead_of_blocks(
    model: torch.nn.Module, passed_by: Collection[str], stand_in: Callable[..., Any]
) -> Iterator[None]:
    """Calls `stand_in(name, block, forward, args, kwargs)` for each call of a block, also of one that is left out; none
    where nothing repeats."""
    blocks = {name: block for name, block in find_blocks(model, passed_by).items() if block is not model}
    blocks |= {name: module for name, module in model.named_modules() if isinstance(module, LeftOut)}
    before: dict[str, Any] = {name: vars(block).get("forward") for name, block in blocks.items()}
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
    call: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.name, self.block, self.forward, args, kwargs)
