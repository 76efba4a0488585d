"""What exact recompute reaches in place of compression."""

from __future__ import annotations

from velora_fx.analysis import Actions, Analysis
from velora_fx.plans import Exact
from velora_fx.search import Search


def exact_alternative(analysis: Analysis, budget_bytes: int) -> Exact | None:
    """The fastest exact step within the budget, or the smallest there is; None for a model without blocks to recompute.

    Compiled, the compiler's own recompute is tried first: it is not offered by any public option, and it is the
    smaller change.
    """
    if analysis.is_compiled:
        peak = analysis.peak(Actions(), compiler_recomputes=True)
        if peak.peak_bytes <= budget_bytes:
            return Exact("compiler", True, peak.peak_bytes, peak.step_seconds)
    if not analysis.blocks:
        return None
    _, peak = Search(analysis, compresses=False, recomputes=True).within(budget_bytes)
    return Exact("checkpointing", peak.peak_bytes <= budget_bytes, peak.peak_bytes, peak.step_seconds)
