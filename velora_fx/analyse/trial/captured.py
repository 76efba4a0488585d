"""The graphs of a model that a plan is at hand for: its forward is run, without memory, and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from velora_fx.analyse.trial.probe import Findings, probe
from velora_fx.analyse.trial.rehearsal import Rehearsal
from velora_fx.options import Options
from velora_fx.simulate import Tracker


def captured(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Options,
    device: torch.device,
    progress: Callable[[str], None],
) -> Findings:
    """Captures the regions of a model for a call; the model is not touched.

    What the model's own forward raises is raised as it is.
    """
    rehearsal = Rehearsal(model, args, kwargs, options, device)

    def run(fake: torch.nn.Module) -> None:
        if not rehearsal.is_compiled:
            rehearsal.forward(fake)
        # A forward that cannot run without values cannot be compiled in one piece either.
        with contextlib.suppress(Exception) if not rehearsal.is_compiled else contextlib.nullcontext():
            rehearsal.traced_forward(fake)

    return probe(rehearsal.fake_model(rehearsal.is_compiled), None, run, Tracker(), progress, rehearsal.passed_by)
