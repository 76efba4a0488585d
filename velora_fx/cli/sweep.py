"""Plans for several budgets side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tabulate import tabulate

from velora_fx.analyse import analyse
from velora_fx.choose import Planner
from velora_fx.names import in_units
from velora_fx.options import Options, budget_bytes_of
from velora_fx.plans import BudgetError, Plan
from velora_fx.progress import planning_progress
from velora_fx.report import inputs_text, step_name, time_ratio

HEADERS = ("budget", "fits", "peak", "compressed", "largest M", "recomputed", "step time", "also exactly")


def sweep(
    model: torch.nn.Module,
    budgets_gb: Sequence[float | str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Options,
    device: torch.device,
    name: str,
) -> tuple[Plan, ...]:
    """A plan for each budget in GiB, from one analysis; where none fits, the tightest there is."""
    sizes = [budget_bytes_of(budget, device) for budget in budgets_gb]
    plans = []
    with planning_progress() as progress:
        planner = Planner(analyse(model, args, kwargs, options, device, progress), name, options)
        for size in sizes:
            try:
                plans.append(planner.plan(size))
            except BudgetError as error:
                plans.append(error.plan)
    return tuple(plans)


def render_sweep(plans: Sequence[Plan]) -> str:
    """One row for each plan; below, the step as it is."""
    rows = []
    for plan in plans:
        assert plan.budget_bytes is not None
        total = sum(len(decision.consumers) for decision in plan.decisions) + len(plan.skipped)
        compressed = sum(len(decision.consumers) for decision in plan.compressed)
        rows.append(
            (
                in_units(plan.budget_bytes),
                "yes" if plan.fits else "NO",
                in_units(plan.planned.peak_bytes),
                f"{compressed}/{total}",
                str(plan.largest_sub_token or "-"),
                str(len(plan.recomputed) or "-"),
                time_ratio(plan, plan.planned.step_seconds),
                _exactly(plan),
            )
        )
    align = ("right", "left", "right", "right", "right", "right", "right", "left")
    first = plans[0]
    untouched = (
        f"untouched: {in_units(first.baseline.peak_bytes)}; {step_name(first)} on {first.device}, {first.optimizer}"
    )
    table = tabulate(rows, HEADERS, colalign=align, disable_numparse=True)
    return f"{table}\n\n{untouched}, step times on {first.rates}; planned for {inputs_text(first)}"


def _exactly(plan: Plan) -> str:
    """Whether the budget is reached without compression, and at what time."""
    if not plan.compressed:
        return "yes, as it is" if plan.fits and not plan.recomputed else "-"
    if plan.exact is None or not plan.exact.fits:
        return "no"
    if plan.exact.means == "untouched":
        return "yes, as it is"
    return f"{time_ratio(plan, plan.exact.step_seconds)} by {plan.exact.means}"
