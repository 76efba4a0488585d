"""What exact recompute reaches in place of compression."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from velora_fx.analyse import Actions, Analysis
from velora_fx.choose.search import Search
from velora_fx.peaks import Peak
from velora_fx.plans import Exact


@dataclass(frozen=True)
class ExactRivals:
    """The exact ways to less memory of a model that was analysed; `checkpointing` searches among recomputed blocks."""

    analysis: Analysis
    checkpointing: Search

    def within(self, budget_bytes: int) -> Exact | None:
        """The fastest exact step within the budget, or the smallest there is; None without blocks to recompute.

        The step as it is comes first; compiled, the compiler's own recompute is next: it takes the least time.
        """
        untouched = self.analysis.baseline
        if untouched.peak_bytes <= budget_bytes:
            return Exact("untouched", True, untouched.peak_bytes, untouched.step_seconds)
        if self.compiler is not None and self.compiler.peak_bytes <= budget_bytes:
            return Exact("compiler", True, self.compiler.peak_bytes, self.compiler.step_seconds)
        if not self.analysis.blocks:
            return None
        _, peak = self.checkpointing.within(budget_bytes)
        return Exact("checkpointing", peak.peak_bytes <= budget_bytes, peak.peak_bytes, peak.step_seconds)

    @cached_property
    def compiler(self) -> Peak | None:
        """The peak of the untouched model under a compiler that is told to recompute; None for an eager step."""
        return self.analysis.peak(Actions(), compiler_recomputes=True) if self.analysis.is_compiled else None
