"""The graphs of a model whose forward is run, without memory, and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from velora_fx.analyse.trial.probe import Findings, probe
from velora_fx.analyse.trial.rehearsal import Rehearsal
from velora_fx.capture import undisturbed
from velora_fx.options import Options
from velora_fx.simulate import Tracker


@undisturbed()
def captured(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Options,
    device: torch.device,
    progress: Callable[[str], None],
) -> Findings:
    """Captures the regions of a model for a call, for a plan that is at hand; the model is not touched.

    What the model's own forward raises is raised as it is.
    """
    rehearsal = Rehearsal(model, args, kwargs, options, device)

    def run(fake: torch.nn.Module, _: Tracker) -> None:
        if not rehearsal.is_compiled:
            rehearsal.forward(fake)
        # A forward that cannot run without values cannot be compiled in one piece either.
        with contextlib.suppress(Exception) if not rehearsal.is_compiled else contextlib.nullcontext():
            rehearsal.traced_forward(fake)

    return probe(rehearsal.fake_model(rehearsal.is_compiled), run, Tracker(), progress, rehearsal.passed_by)


@undisturbed()
def with_traced_graphs(findings: Findings, rehearsal: Rehearsal, progress: Callable[[str], None]) -> Findings:
    """The findings of an eager step with the graphs of the calls as a compiler traces them, should the model be
    compiled later: its forward then makes masks that a step leaves out."""

    def run(fake: torch.nn.Module, _: Tracker) -> None:
        with contextlib.suppress(Exception):  # what cannot run without values cannot be compiled in one piece either
            rehearsal.traced_forward(fake)

    traced = probe(rehearsal.fake_model(False), run, Tracker(), progress, rehearsal.passed_by)
    graphs = {name: list(found) for name, found in findings.graphs.items()}
    for name, found in graphs.items():
        known = {graph.key for graph in found}
        found += [graph for graph in traced.graphs.get(name, ()) if graph.key not in known]
    return replace(findings, graphs=graphs)
