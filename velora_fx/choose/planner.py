"""Makes plans for a model that was analysed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from velora_fx.analyse import Actions, Analysis
from velora_fx.choose.price import FAIR_SHARE, STEPS
from velora_fx.choose.search import Search
from velora_fx.choose.speed import faster
from velora_fx.choose.write_plan import write_plan
from velora_fx.names import in_units
from velora_fx.options import Options
from velora_fx.peaks import Peak
from velora_fx.plans import BudgetError, Exact, Plan

AUTO, COMPRESS, EXACT = (True, True), (True, False), (False, True)  # whether to compress, whether to recompute
KINDS = {"auto": AUTO, "compress": COMPRESS, "exact": EXACT}


@dataclass(frozen=True)
class Planner:
    """Makes plans for a model that was analysed, as many as there are budgets."""

    analysis: Analysis
    name: str
    options: Options

    def plan(self, budget_bytes: int | None) -> Plan:
        """The plan of least price within the budget, checked by a simulation of the planned step.

        With no budget nothing is done for memory. Raises BudgetError, with the tightest plan there is, if no plan fits.
        """
        actions, planned, exact = Actions(), self.analysis.baseline, None
        if budget_bytes is not None:
            actions, planned = self._within(budget_bytes)
        fits = budget_bytes is None or planned.peak_bytes <= budget_bytes
        if self.options.objective == "speed" and fits:
            largest = max(self.options.sub_token_sizes or STEPS[:1])
            actions, planned = faster(self.analysis, actions, planned, budget_bytes, largest)
        if budget_bytes is not None and actions.sizes:
            exact = self._exact_rival(budget_bytes)
        plan = write_plan(
            self.analysis, self._widest.problem, actions, planned, exact, budget_bytes, self.name, self.options
        )
        if not plan.fits:
            raise BudgetError(self._unreachable(plan), plan)
        return plan

    def _within(self, budget_bytes: int) -> tuple[Actions, Peak]:
        """The cheapest actions that meet the budget, else the tightest there are.

        Larger sub-tokens are offered where no actions with smaller ones meet it in a step of fair time. What the
        searches for one kind of action alone find is compared with: the solver's estimates may be off.
        """
        fair_seconds = (1 + FAIR_SHARE) * self.analysis.baseline.step_seconds
        best = None
        for largest in self._bounds:
            if largest != self._bounds[0] and best is None and self._smallest_bytes > budget_bytes:
                break
            best = self._cheapest(self._searches(largest), budget_bytes) or best
            if best is not None and best[1].step_seconds <= fair_seconds:
                break
        return best or self.tightest(self.options.method)

    def _cheapest(self, searches: Sequence[Search], budget_bytes: int) -> tuple[Actions, Peak] | None:
        """The cheapest that the searches find within the budget, of which the first has all that is allowed.

        Those that expect nothing or nothing better are left out. Of an eager step the solver's estimates tell so, were
        they as much too high as those of the first. Of a compiled one they tell too little.
        """
        best, least = None, math.inf
        cost, found, _ = searches[0].expected(budget_bytes)
        expected = [(cost, searches[0])]
        for search in searches[1:]:
            known = min(cost for cost, _ in expected)
            if known == 0:
                break
            if cost < math.inf and not (search.recomputes or found.recomputed):
                continue  # to compress alone is what the first found
            if self.analysis.is_compiled or search.least_cost(budget_bytes, searches[0].most_too_high_bytes) < known:
                expected.append((search.expected(budget_bytes)[0], search))
        for cost, search in sorted(expected, key=lambda pair: pair[0]):
            if least <= cost:
                break
            actions, peak = search.within(budget_bytes)
            cost = self._widest.problem.cost(actions)
            if peak.peak_bytes <= budget_bytes and cost < least:
                best, least = (actions, peak), cost
        return best

    @property
    def _smallest_bytes(self) -> int:
        """The smallest peak that is reached with all that is allowed."""
        return self.tightest(self.options.method)[1].peak_bytes

    def tightest(self, method: str) -> tuple[Actions, Peak]:
        """The actions of the smallest peak that a method reaches."""
        return self._search(*KINDS[method], None).tightest

    def _searches(self, largest: int | None) -> list[Search]:
        """The searches with sub-tokens up to `largest`, by what is allowed."""
        method = self.options.method
        kinds = tuple(KINDS.values()) if method == "auto" else (KINDS[method],)
        return [self._search(*kind, largest if kind[0] else None) for kind in kinds]

    def _search(self, compresses: bool, recomputes: bool, largest: int | None) -> Search:
        key = (compresses, recomputes, largest)
        if key not in self._made:
            self._made[key] = Search(self.analysis, compresses, recomputes, largest)
        return self._made[key]

    @cached_property
    def _made(self) -> dict[tuple[bool, bool, int | None], Search]:
        return {}

    @cached_property
    def _bounds(self) -> tuple[int | None, ...]:
        """The steps of sub-token sizes that offer more than the step before; None offers all."""
        compresses = self.options.compresses
        offered = {size for candidate in self.analysis.candidates for size in candidate.sizes} if compresses else set()
        steps = zip((0, *STEPS), STEPS, strict=False)
        bounds = [most for least, most in steps if any(least < size <= most for size in offered)]
        return (*bounds, None) if not bounds or max(offered) > STEPS[-1] else tuple(bounds)

    @property
    def _widest(self) -> Search:
        """The search among all actions that are allowed."""
        return self._search(self.options.compresses, self.options.recomputes, None)

    def _exact_rival(self, budget_bytes: int) -> Exact | None:
        """The fastest exact step within the budget, or the smallest there is; None without blocks to recompute.

        Of a compiled step it is an estimate, as it is only compared with.
        """
        untouched = self.analysis.baseline
        if untouched.peak_bytes <= budget_bytes:
            return Exact("untouched", True, untouched.peak_bytes, untouched.step_seconds)
        if not self.analysis.blocks:
            return None
        cost, _, peak = self._search(*EXACT, None).expected(budget_bytes)
        return Exact("checkpointing", cost < math.inf, peak.peak_bytes, peak.step_seconds)

    def _unreachable(self, plan: Plan) -> str:
        """What stands in the way of the budget, and what would help."""
        assert plan.budget_bytes is not None
        held = {**plan.planned.breakdown, **plan.planned.overhead}
        parts = ", ".join(f"{name} {in_units(size)}" for name, size in held.items() if size)
        others = "" if plan.is_factored else "gradients='factored', "
        return (
            f"no plan fits {in_units(plan.budget_bytes)}: the smallest peak that can be reached is "
            f"{in_units(plan.planned.peak_bytes)} ({parts}, at the {plan.planned.moment}); {self._by_method(plan)}"
            f"{self._why_nothing(plan)}. "
            f"Try a larger budget, a smaller batch or sequence, {others}or an optimizer with less state"
        )

    def _why_nothing(self, plan: Plan) -> str:
        """Why nothing can be done about this model, where that is so: the reason of most modules."""
        if self.analysis.candidates or self.analysis.sharing or self.analysis.blocks or not plan.skipped:
            return ""
        reason, count = Counter(skipped.reason for skipped in plan.skipped).most_common(1)[0]
        return f". Nothing can be compressed or recomputed: {reason} ({count} of {len(plan.skipped)} modules left out)"

    def _by_method(self, plan: Plan) -> str:
        """What each method reaches at the least."""
        smallest = {self.options.method: plan.planned.peak_bytes}
        for method in KINDS:
            if method not in smallest and not (plan.is_factored and method == "exact"):
                smallest[method] = self.tightest(method)[1].peak_bytes
        return ", ".join(f"method={method!r} reaches {in_units(size)}" for method, size in smallest.items())
