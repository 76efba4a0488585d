"""A model's forward as torch.compile runs it: compiled graphs one after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch.fx import Node

from velora_fx.capture import carriers_of, state_of
from velora_fx.passes.cut_at_calls import cut_at_calls
from velora_fx.passes.hoist_shared import Hoisted, hoist_shared
from velora_fx.passes.join_graphs import Piece, join_graphs
from velora_fx.runtime import StandIn
from velora_fx.simulate import FiniteValues, kernels_of
from velora_fx.simulate.compiled.autograd_node import OneGraph
from velora_fx.simulate.compiled.block_calls import BlockCall, record
from velora_fx.simulate.compiled.inductor import Inductor, Observe, describe, structure
from velora_fx.simulate.compiled.trace import Trace, tensors_of, trace

ObserverOf = Callable[[Mapping[int, str]], Observe]
Inside = Callable[[str], AbstractContextManager[None]]
Apart = Callable[[Sequence[BlockCall]], frozenset[int]]


def unobserved(state: Mapping[int, str]) -> Observe:
    """An observer that looks away."""
    return lambda tensors, kept: None


@dataclass(frozen=True)
class Step:
    """A graph to run; `name` is that of the block it stands for, "" for what is compiled around such blocks."""

    name: str
    piece: Piece


@dataclass(frozen=True)
class Program:
    """Steps in order over named values: the state of the model and the tensors it is called with (`names`), constants
    and the steps' outputs. `rebuild` makes the model's output from the values named `results`."""

    steps: tuple[Step, ...]
    names: tuple[str, ...]
    constants: Mapping[str, torch.Tensor]
    results: tuple[str, ...]
    rebuild: Callable[[list[Any]], Any]


class CompiledForward:
    """Takes the place of a model's forward and runs its compiled graphs.

    `observer_of` makes the observer of one graph, given the parameter behind each of its inputs; `inside` the context
    for one, given the name of its block.
    """

    def __init__(
        self, model: torch.nn.Module, program: Program, inductor: Inductor, observer_of: ObserverOf, inside: Inside
    ) -> None:
        self.model = model
        self.program = program
        self.inductor = inductor
        self.observer_of = observer_of
        self.inside = inside

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outputs = OneGraph.apply(self.run, *self.state.values(), *tensors_of((args, kwargs)))  # type: ignore[no-untyped-call]
        return self.program.rebuild(list(outputs))

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """All live tensors of the model, as the program's first names."""
        return {**state_of(self.model), **carriers_of(self.model)}

    def run(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The results of the program for the model's state and the tensors that it is called with."""
        program = self.program
        values = {**dict(zip(program.names, tensors, strict=True)), **program.constants}
        last = {name: number for number, step in enumerate(program.steps) for name in step.piece.inputs}
        for number, step in enumerate(program.steps):
            piece = step.piece
            with self.inside(step.name):
                outputs = self.inductor.run(piece.gm, [values[n] for n in piece.inputs], self.observer_of(piece.state))
            values.update(zip(piece.outputs, outputs, strict=True))
            del outputs
            for name in {*piece.inputs, *piece.outputs}:
                if last.get(name, number) <= number and name not in program.results:
                    del values[name]
        return [values[name] for name in program.results]


def compiled_forward(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    graphs: Mapping[str, Sequence[Any]],
    inductor: Inductor,
    observer_of: ObserverOf,
    inside: Inside,
    apart: Apart,
    passed_by: Collection[str] = (),
    traces: dict[Hashable, Trace] | None = None,
) -> CompiledForward:
    """The forward of a fake model for fake inputs as `torch.compile(model)` runs it.

    `apart` picks the calls of blocks, with the graphs in `graphs` or those of the regions installed on them, that are
    compiled each by itself, equal ones once: as exact as it gets with none, the sooner the more there are. `passed_by`
    is as in `find_blocks`, `traces` are those of before, for the same arguments. Raises ValueError for a model that
    cannot be traced as a whole.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), kernels_of(inductor.device), FiniteValues():
        calls = record(model, args, kwargs, graphs, passed_by)
        key, traces = _key(model, calls), {} if traces is None else traces
        if key not in traces or key is None:
            traces[key] = trace(model, args, kwargs, calls, passed_by)
        program = _program(traces[key], calls, apart(calls))
    return CompiledForward(model, program, inductor, observer_of, inside)


def _key(model: torch.nn.Module, calls: Sequence[BlockCall]) -> Hashable:
    """What a trace depends on besides the model's code and arguments; None where a forward outside of the calls that it
    leaves out has been replaced."""
    traced = {call.name for call in calls if call.graph is None}
    left_out = tuple(f"{call.name}." for call in calls if call.name not in traced)
    for name, module in model.named_modules():
        if isinstance(vars(module).get("forward"), StandIn) and not f"{name}.".startswith(left_out):
            return None
    outlines = []
    for call in calls:
        captured = None if call.graph is None else call.graph.captured
        result = None if captured is None else repr((captured.outputs, captured.constants, captured.slots))
        outlines.append((call.name, call.num_tensors, call.num_cached, *map(describe, call.outputs), result))
    return (*state_of(model), *carriers_of(model)), tuple(outlines)


def _program(traced: Trace, calls: Sequence[BlockCall], inner: frozenset[int]) -> Program:
    gm, apart = traced.gm, [(number, call) for number, call in enumerate(calls) if call.gm is not None]
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    outputs = list(gm.graph.output_node().args[0])  # type: ignore[arg-type]
    num_names = len(names) - sum(len(call.outputs) for call in calls)
    state = {full: name for name, full in gm.meta["state"].items()}
    returned, marked = iter(names[num_names:]), iter(outputs[traced.num_results :])
    markers = [list(islice(marked, call.num_tensors)) for _, call in apart]
    constants: dict[str, torch.Tensor] = {}
    results = [node.name for node in outputs[: traced.num_results]]
    shared = _Shared(name for group in markers for name in {_name(marker) for marker in group})
    steps: list[Step] = []
    around: list[list[Piece]] = [[]]
    for position, segment in enumerate(cut_at_calls(gm, markers, outputs[: traced.num_results])):
        own = segment.gm.meta["state"]
        numbers = {k: own[name] for k, name in enumerate(segment.inputs) if name in own}
        around[-1] += [Piece(segment.gm, segment.inputs, segment.outputs, numbers)] if segment.outputs else []
        if position == len(apart):
            break
        number, call = apart[position]
        assert call.gm is not None
        projections = {f"projection_{number}_{k}": v for k, v in enumerate(call.projections)}
        constants.update(projections)
        given = (*(state[full] for full in call.state), *map(_name, markers[position]))
        inputs = (*given, *(state[full] for full in call.carriers), *projections)
        names_returned = tuple(islice(returned, len(call.outputs)))
        results += names_returned[len(names_returned) - call.num_cached :] if traced.returns_caches else ()
        made, piece = shared.apart(Piece(call.gm, inputs, names_returned, dict(enumerate(call.state))))
        around[-1] += [made] if made else []
        if number in inner:
            steps.append(Step(call.name, piece))
            around.append([])
        else:
            around[-1].append(piece)
    joined = _joined(around, steps, results)
    return Program(joined, tuple(names[:num_names]), constants, tuple(results), traced.rebuild)


class _Shared:
    """Takes out of blocks what they make of tensors that several are given; `names` has each once a block."""

    def __init__(self, names: Iterable[str]) -> None:
        self.common = {name for name, count in Counter(names).items() if count > 1}
        self._hoisted: dict[tuple[int, tuple[int, ...]], Hoisted | None] = {}
        self._made: dict[tuple[Any, ...], tuple[str, ...]] = {}

    def apart(self, piece: Piece) -> tuple[Piece | None, Piece]:
        """What has to run before, if nothing made the same yet, and the block without it."""
        given = tuple(number for number, name in enumerate(piece.inputs) if name in self.common)
        key = id(piece.gm), given
        if key not in self._hoisted:
            self._hoisted[key] = hoist_shared(piece.gm, given)
        hoisted = self._hoisted[key]
        if hoisted is None:
            return None, piece
        inputs = tuple(piece.inputs[number] for number in hoisted.inputs)
        made, expression = None, (structure(hoisted.shared), inputs)
        if expression not in self._made:
            num_outputs = len(hoisted.shared.graph.output_node().args[0])  # type: ignore[arg-type]
            names = tuple(f"shared_{len(self._made)}_{k}" for k in range(num_outputs))
            self._made[expression] = names
            made = Piece(hoisted.shared, inputs, names, {})
        return made, replace(piece, gm=hoisted.rest, inputs=(*piece.inputs, *self._made[expression]))


def _joined(around: Sequence[Sequence[Piece]], steps: Sequence[Step], results: Sequence[str]) -> tuple[Step, ...]:
    """The steps, with what lies between them as one graph each."""
    found: list[Step] = []
    for number, pieces in enumerate(around):
        later = [
            *(piece for group in around[number + 1 :] for piece in group),
            *(step.piece for step in steps[number:]),
        ]
        needed = {*results, *(name for piece in later for name in piece.inputs)}
        found += [Step("", join_graphs(pieces, needed))] if pieces else []
        found += steps[number : number + 1]
    return tuple(found)


def _name(marker: Node) -> str:
    source = marker.args[0]
    assert isinstance(source, Node)
    return source.name
