"""What planning assumes of a model's output."""

from __future__ import annotations

from velora_fx.analyse import Analysis
from velora_fx.names import in_units
from velora_fx.plans import Plan

SAME = 0.01  # peaks that differ by less need no word


def output_notes(analysis: Analysis, plan: Plan) -> list[str]:
    """What is assumed of the model's output, where another use of it makes a difference."""
    notes = []
    timeline = plan.planned.timeline or analysis.untouched
    more = timeline.peak_bytes_with_output - timeline.peak.peak_bytes
    if more > SAME * plan.planned.peak_bytes:
        peak_bytes = plan.planned.peak_bytes + more
        is_over = plan.budget_bytes is not None and plan.planned.peak_bytes <= plan.budget_bytes < peak_bytes
        notes.append(
            "the model's output is taken to be let go once the loss is made, as in model(**batch).loss.backward(); in "
            f"a loop that keeps it (out = model(**batch)) the peak is {in_units(peak_bytes)}"
            f"{', over the budget' if is_over else ''}"
        )
    if analysis.untouched.returned.float32_bytes:
        size = in_units(analysis.untouched.returned.float32_bytes)
        notes.append(
            "the loss is a stand-in, the mean square of the model's output; a cross-entropy may hold that output in "
            f"float32 more than once, each time {size}: pass loss_fn, or example_inputs with labels"
        )
    return notes
