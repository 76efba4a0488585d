"""A trial step that captures every region of a fake model and records what backward keeps of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch

from velora_fx.analyse.trial.overwrites import Overwrites
from velora_fx.capture import (
    Call,
    Checkpoint,
    RegionGraph,
    child_regions,
    find_graph,
    find_regions,
    has_replaced_forwards,
    key_of,
    make_graph,
    merge_graph,
    noted_checkpoints,
)
from velora_fx.passes.find_products import find_products
from velora_fx.runtime import hooks_in, make_call
from velora_fx.simulate import SavedTensors, Saving, Timeline, Tracker

AnyTracker = TypeVar("AnyTracker", bound=Tracker)


def full_name(region: str, part: str) -> str:
    """The dotted name of a part of a region."""
    return f"{region}.{part}" if region and part else region or part


@dataclass(frozen=True)
class Use:
    """One product of the model with a trainable parameter: where it is, and why it cannot be compressed (or None).

    `parameter` is its name in the region, `weight` the first that it has in the model: tied ones have several.
    `input_dim` is as in `Product`; `is_recomputed` tells that its input is made again in backward (checkpointing).
    """

    region: str
    consumer: str
    parameter: str
    weight: str
    reason: str | None
    input_dim: int | None = None
    is_recomputed: bool = False


@dataclass
class Findings:
    """What the trial step found: the graphs of each region by its name, products, failures, and saved tensors.

    `inputs` has the input of each product by region and consumer; `calls` counts each region's calls; `empty_caches`
    tells whether any was given a key-value cache to fill; `overwrites` which regions have what recompute relies on
    written in place.
    """

    graphs: dict[str, list[RegionGraph]] = field(default_factory=dict)
    uses: dict[tuple[str, str], Use] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    empty_caches: bool = False
    overwrites: Overwrites = field(default_factory=Overwrites)
    savings: tuple[Saving, ...] = ()
    inputs: Mapping[tuple[str, str], Saving] = field(default_factory=dict)
    last_uses: dict[int, int] = field(default_factory=dict)
    timeline: Timeline | None = None


def probe(
    model: torch.nn.Module,
    run: Callable[[torch.nn.Module, AnyTracker], Timeline | None],
    tracker: AnyTracker,
    progress: Callable[[str], None],
    passed_by: Collection[str] = (),
) -> Findings:
    """Runs `run(model, tracker)`, a step or the forward alone, with every region captured; a region that fails is tried
    again by its parts. `passed_by` is as in `find_regions`."""
    findings = Findings(overwrites=Overwrites(model.parameters()))
    saved = SavedTensors(tracker)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    findings.inputs = saved.inputs
    opened: list[Checkpoint] = []
    library: list[RegionGraph] = []

    def observe(name: str, block: torch.nn.Module) -> None:
        forward = vars(block).get("forward")
        if not isinstance(forward, _Probe):
            block.forward = _Probe(name, block, forward, findings, saved, names, opened, library, observe, progress)

    for name, block in find_regions(model, passed_by).items():
        findings.calls[name] = 0
        observe(name, block)
    with saved.on(), noted_checkpoints(opened), findings.overwrites:
        findings.timeline = run(model, tracker)
    findings.savings = tuple(saved.savings)
    findings.last_uses = dict(saved.last_uses)
    return findings


@dataclass
class _Probe:
    name: str
    block: torch.nn.Module
    forward: Callable[..., Any] | None
    findings: Findings
    saved: SavedTensors
    names: Mapping[int, str]
    opened: Sequence[Checkpoint]
    library: list[RegionGraph]
    observe: Callable[[str, torch.nn.Module], None]
    progress: Callable[[str], None]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.findings.calls[self.name] = self.findings.calls.get(self.name, 0) + 1
        call = make_call(self.block, args, kwargs)
        graph = self.graph_of(call, args, kwargs)
        if graph.gm is None:
            self.fall_back(graph)
            return (self.forward or partial(type(self.block).forward, self.block))(*args, **kwargs)
        with self.findings.overwrites.inside(self.name, call.tensors[len(call.state) :]):
            return graph.result(graph.recomputed(partial(self.saved.run, graph.gm, self.name), call))

    def graph_of(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RegionGraph:
        given, passed = [*args, *kwargs.values()], [*call.args, *call.kwargs.values()]
        self.findings.empty_caches |= any(a is not b for a, b in zip(given, passed, strict=True))
        key = key_of(call)
        reason = hooks_in(self.block)
        if reason is not None:
            return RegionGraph(key, (), None, reason)
        graphs = self.findings.graphs.setdefault(self.name, [])
        is_alone = self.forward is not None or has_replaced_forwards(self.block)  # then equal keys are no equal blocks
        library = graphs if is_alone else self.library
        graph = find_graph(library, call, key, exact=True)
        if graph is None:
            self.progress(self.name or "the model")
            graph = make_graph(call, key, self.forward)
            if not is_alone:
                graph = merge_graph(library, graph)
                if graph not in library:
                    library.append(graph)
        if graph not in graphs and graph.gm is not None:
            graphs.append(graph)
            self.note_products(graph, call.state)
        return graph

    def note_products(self, graph: RegionGraph, state: dict[str, torch.Tensor]) -> None:
        assert graph.gm is not None
        for product in find_products(graph.gm):
            weight = state[product.parameter]
            if weight.requires_grad:
                name, is_recomputed = self.names[id(weight)], graph.checkpoint is not None or bool(self.opened)
                use = Use(
                    self.name, product.consumer, product.parameter, name, product.reason, product.input_dim,
                    is_recomputed,
                )  # fmt: skip
                self.findings.uses.setdefault((self.name, product.consumer), use)

    def fall_back(self, graph: RegionGraph) -> None:
        """Observes the parts of a module that cannot be captured, keeping the reason."""
        self.findings.failures.setdefault(self.name, graph.reason or "")
        for name, child in child_regions(self.block, self.name).items():
            self.findings.calls.setdefault(name, 0)
            self.observe(name, child)
