"""Predicted beside measured, as text for people."""

from __future__ import annotations

from math import prod

from tabulate import tabulate

from velora_fx.names import in_units
from velora_fx.peaks import Pair, compare_categories, compare_peaks, mismatch
from velora_fx.plans import UNCOUNTED, Plan


def render_measured(plan: Plan) -> str:
    """Predicted beside measured, if there was a real step."""
    if plan.measured is None:
        return ""
    pairs = compare_peaks(plan.planned, plan.measured) + compare_categories(plan.planned, plan.measured)
    rows = [
        (pair.name, in_units(pair.predicted_bytes), in_units(pair.measured_bytes), _percent(pair)) for pair in pairs
    ]
    headers = ("a real step", "predicted", "measured", "predicted over measured")
    table = tabulate(rows, headers, colalign=("left", "right", "right", "right"), disable_numparse=True)
    smaller = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in _smaller_inputs(plan).items())
    return f"{table}\nthat step was smaller than planned for: {smaller}" if smaller else table


def _smaller_inputs(plan: Plan) -> dict[str, tuple[int, ...]]:
    """The inputs of the real step that had fewer entries than planned for."""
    seen = plan.measured.inputs if plan.measured is not None else {}
    planned = {item.name: prod(item.shape) for item in plan.inputs}
    return {name: shape for name, shape in seen.items() if prod(shape) < planned.get(name, 0)}


def _percent(pair: Pair) -> str:
    return "" if pair.difference_percent is None else f"{pair.difference_percent:+.2f}%"


def mismatch_text(plan: Plan) -> str | None:
    """What to say of a plan that is off by more than 5%; None if it is not, or is above a step that was smaller."""
    found = mismatch(plan.planned, plan.measured) if plan.measured is not None else None
    if found is None or (_smaller_inputs(plan) and found[0].predicted_bytes > found[0].measured_bytes):
        return None
    (off, numbers), (most, most_numbers) = ((pair, _numbers(pair)) for pair in found)
    kernels = f"; {UNCOUNTED}" if plan.has_uncounted else ""
    return (
        f"the plan is {_percent(off)} off the peak of {off.name} memory ({numbers}), most of it in {most.name} "
        f"({most_numbers}): plan with the batch, loss and optimizer of the real step{kernels}"
    )


def _numbers(pair: Pair) -> str:
    return f"predicted {in_units(pair.predicted_bytes)}, measured {in_units(pair.measured_bytes)}"
