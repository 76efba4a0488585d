"""How much CPU time a plan takes, and what the first compiled step of the same model takes beside it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tabulate import tabulate

import velora_fx
from tools.bench.models import llama_of_shape
from velora_fx.cli import presets
from velora_fx.simulate.compiled.inductor import KEPT

HALF, FACTORED = "half of the way", "factored in 24 GiB"


@dataclass(frozen=True)
class PlanRow:
    """CPU seconds (`time.process_time`) of one plan: for Llama blocks 64 wide, or for a preset on CUDA.

    `layers` is None for a preset's own. `first_step_seconds` is what `torch.compile` takes for the model's first step,
    None where it is not run. `error` is why there is no figure.
    """

    model: str
    layers: int | None
    compiled: bool
    budget: str
    seconds: float | None = None
    first_step_seconds: float | None = None
    error: str | None = None


PLANS = {
    **{f"toy-{n}": PlanRow("toy", n, False, HALF) for n in (2, 4, 12, 16, 64)},
    **{f"toy-{n}-compiled": PlanRow("toy", n, True, HALF) for n in (2, 4, 16, 64)},
    "llama-7b": PlanRow("llama-7b", None, False, HALF),
    "llama-7b-compiled": PlanRow("llama-7b", None, True, HALF),
    "llama-7b-factored": PlanRow("llama-7b", None, True, FACTORED),
    "70b": PlanRow("70b", 80, False, HALF),
}
QUICK_PLANS = ("toy-2", "toy-12")


def measure_plan(row: PlanRow) -> PlanRow:
    """Plans as the row says, once its budget is known: half of the way from the smallest peak to the untouched one."""
    try:
        model, inputs, options = _step_of(row)
        budget_gb = 24.0 if row.budget == FACTORED else _half_of_the_way(model, inputs, options)
        KEPT.clear()  # what the search for the budget has compiled
        start = time.process_time()
        velora_fx.plan(model, budget_gb, inputs, **options)
        row = replace(row, seconds=time.process_time() - start)
        return (
            replace(row, first_step_seconds=_first_step(model, inputs)) if row.compiled and row.model == "toy" else row
        )
    except Exception as error:
        return replace(row, error=f"{type(error).__name__}: {error}")


def _step_of(row: PlanRow) -> tuple[torch.nn.Module, Any, dict[str, Any]]:
    """The model, its inputs, and the options of the plan."""
    if row.model == "toy":
        return *llama_of_shape(64, row.layers or 2, 172, 4, 4, 96, (4, 64), "cpu"), {"compiled": row.compiled}
    if row.model == "70b":
        model, inputs = llama_of_shape(8192, row.layers or 80, 28672, 64, 8, 32000, (4, 2048), "meta")
        return model, inputs, {"compiled": row.compiled, "optimizer": "sgd", "device": "cuda"}
    factored = {"gradients": "factored"} if row.budget == FACTORED else {"optimizer": "sgd"}
    model, inputs = presets.load(row.model, 1 if row.budget == FACTORED else 4, 2048, torch.bfloat16)
    return model, inputs, {"compiled": row.compiled, "device": "cuda", **factored}


def _half_of_the_way(model: torch.nn.Module, inputs: Any, options: dict[str, Any]) -> float:
    try:
        velora_fx.plan(model, 1e-6, inputs, **options)
    except velora_fx.BudgetError as error:
        return (error.smallest_peak_bytes + error.plan.baseline.peak_bytes) / 2**31
    raise RuntimeError("a budget of a kilobyte was met")


def _first_step(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> float:
    """CPU seconds of the first step of `torch.compile(model)`, compiler caches off."""
    torch._dynamo.reset()
    start = time.process_time()
    with torch._inductor.config.patch(fx_graph_cache=False):
        torch.compile(model)(**inputs).loss.backward()
    return time.process_time() - start


def plan_table(rows: Sequence[PlanRow]) -> str:
    """A line for each plan."""
    cells = [
        (
            f"{row.model}{'' if row.layers is None else f', {row.layers} layers'}",
            "compiled" if row.compiled else "eager",
            row.budget,
            "failed" if row.seconds is None else f"{row.seconds:.1f}",
            "" if row.first_step_seconds is None else f"{row.first_step_seconds:.1f}",
        )
        for row in rows
    ]
    headers = ("model", "step", "budget", "plan, CPU s", "torch.compile's first step, CPU s")
    return tabulate(cells, headers, colalign=("left", "left", "left", "right", "right"), disable_numparse=True)
