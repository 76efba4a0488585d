"""The search for the actions of least cost that fit a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from velora_fx.analyse import Actions, Analysis
from velora_fx.choose.items import highest_levels
from velora_fx.choose.problem import Problem
from velora_fx.choose.solver import RELATIVE_GAP
from velora_fx.devices import tensors_within, with_overhead
from velora_fx.peaks import Peak

RUNGS, COMPILED_RUNGS = 4096, 64  # a simulation of a compiled step compiles what is new in it


@dataclass(frozen=True)
class Search:
    """Finds the cheapest actions of the allowed kinds, each result simulated: the simulation is the truth.

    `largest` is as in `Problem`.
    """

    analysis: Analysis
    compresses: bool
    recomputes: bool
    largest: int | None = None

    @cached_property
    def problem(self) -> Problem:
        """What there is to choose from."""
        return Problem(self.analysis, self.compresses, self.recomputes, self.largest)

    def within(self, budget_bytes: int) -> tuple[Actions, Peak]:
        """The cheapest actions whose peak is within the budget; the tightest there are if none is.

        The solver knows the moments of a step with nothing done about it; a simulation tells the true peak of what it
        chose. Along a ladder of targets for the solver, the same for every budget, the highest rung that fits is
        searched by halving, so that a larger budget never gets a dearer plan, but for the solver's gap: one more
        approximate, where blocks are not recomputed. Taken is the lowest rung of the same cost, if it fits too. The
        peaks along the ladder are estimates; what is found is simulated in full, and searched again for less if it is
        over.
        """
        tensor_budget_bytes = tensors_within(budget_bytes, self.analysis.device)
        if self.analysis.baseline.tensor_bytes <= tensor_budget_bytes:
            return Actions(), self.analysis.baseline
        target_bytes = self._target_of(tensor_budget_bytes)
        while True:
            actions, estimate = self._found_within(target_bytes)
            peak = self.analysis.peak(actions)
            excess_bytes = peak.tensor_bytes - tensor_budget_bytes
            if excess_bytes <= 0 or estimate.tensor_bytes > target_bytes:  # it fits, or it is the tightest there is
                return actions, peak
            target_bytes -= excess_bytes

    def expected(self, budget_bytes: int) -> tuple[float, Actions, Peak]:
        """The first of these with its estimate, and what it would cost: infinitely much if the estimate is over."""
        target_bytes = self._target_of(tensors_within(budget_bytes, self.analysis.device))
        actions, estimate = self._found_within(target_bytes)
        return self.problem.cost(actions) if estimate.tensor_bytes <= target_bytes else math.inf, actions, estimate

    def least_cost(self, budget_bytes: int, doubt_bytes: int) -> float:
        """What nothing that is found here would cost less than, were the solver's estimates so much too high."""
        target_bytes = self._target_of(tensors_within(budget_bytes, self.analysis.device)) + doubt_bytes
        levels = self.problem.program.levels_within(target_bytes)
        return math.inf if levels is None else self.problem.program.cost(levels)

    @property
    def most_too_high_bytes(self) -> int:
        """By how much the solver's estimates are too high, as far as it is known."""
        return max(0, *(-error for error in self._end_errors.values()))

    def _target_of(self, tensor_budget_bytes: int) -> int:
        """The budget for estimates: those of a compiled step are about as much off as that of the untouched one is."""
        return tensor_budget_bytes + max(0, self._untouched.tensor_bytes - self.analysis.baseline.tensor_bytes)

    def _found_within(self, tensor_budget_bytes: int) -> tuple[Actions, Peak]:
        if self._untouched.tensor_bytes <= tensor_budget_bytes:
            return Actions(), self._untouched
        if self._bottom.tensor_bytes > tensor_budget_bytes and self._tightest[1].tensor_bytes > tensor_budget_bytes:
            return self._tightest
        return self._no_dearer_than_one_size(self._on_the_ladder(tensor_budget_bytes), tensor_budget_bytes)

    def _no_dearer_than_one_size(self, found: tuple[Actions, Peak], tensor_budget_bytes: int) -> tuple[Actions, Peak]:
        """What was found or, where that fits and is cheaper, everything at one size of sub-tokens.

        The solver's estimates may be off; whoever tries sizes by hand is not to find better. A larger size that does
        not fit rules out all smaller ones.
        """
        if self.recomputes or not self.problem.sizes_matter:
            return found
        most = max((len(candidate.sizes) for candidate in self.problem.offered), default=0)
        for actions in reversed([self.problem.all_at(index) for index in range(most)]):
            if self.problem.cost(actions) >= self.problem.cost(found[0]):
                continue
            peak = self.analysis.estimate(actions)
            if peak.tensor_bytes > tensor_budget_bytes:
                break
            found = actions, peak
        return found

    def _on_the_ladder(self, tensor_budget_bytes: int) -> tuple[Actions, Peak]:
        for is_trusted in (True, False):
            low, high = 0, self._rungs
            errors = dict(self._end_errors)
            while high - low > 1:
                middle = (low + high) // 2
                fits = self._expected_to_fit(middle, tensor_budget_bytes, errors) if is_trusted else None
                if fits is None:
                    peak = self._rung(middle)[1]
                    errors[middle] = peak.tensor_bytes - self._estimate(middle)
                    fits = peak.tensor_bytes <= tensor_budget_bytes
                low, high = (middle, high) if fits else (low, middle)
            for rung in (self._lowest_alike(low), low):
                found = self._rung(rung)
                if found[1].tensor_bytes <= tensor_budget_bytes:
                    return found
        return self._at_one_size(tensor_budget_bytes)

    def _at_one_size(self, tensor_budget_bytes: int) -> tuple[Actions, Peak]:
        """What is left where every ladder is too short: projections that are not kept are still made in backward, and
        the larger the sub-tokens the less they take there."""
        most = max((len(candidate.sizes) for candidate in self.problem.offered), default=0)
        for index in range(0 if self.problem.sizes_matter else most):
            actions = self.problem.all_at(index)
            peak = self.analysis.estimate(actions)
            if peak.tensor_bytes <= tensor_budget_bytes:
                return actions, peak
        return self._tightest

    def _expected_to_fit(self, rung: int, tensor_budget_bytes: int, errors: Mapping[int, int]) -> bool | None:
        """What needs no simulation, as `errors` tell how far off the solver's estimates are at other rungs.

        Far from the budget a rung needs no solution either. The error of a solution is between those of its neighbours,
        but for compiled steps, whose code is another with each choice.
        """
        target_bytes, step_bytes = self._target(rung), self._target(1) - self._target(0)
        ends = self._end_errors.values()
        margin = (max(ends) - min(ends)) // 4 + step_bytes
        if target_bytes + max(ends) + margin <= tensor_budget_bytes:
            return True
        if target_bytes + min(ends) - margin > tensor_budget_bytes:
            return False
        if self.analysis.is_compiled or self._levels(rung) is None:
            return None
        estimate = self._estimate(rung)
        below, above = max(r for r in errors if r < rung), min(r for r in errors if r > rung)
        around = errors[below], errors[above]
        if estimate + max(around) + step_bytes <= tensor_budget_bytes:
            return True
        return False if estimate + min(around) - step_bytes > tensor_budget_bytes else None

    def _lowest_alike(self, rung: int) -> int:
        """The lowest rung of the same cost: which of several solutions of that cost the solver finds is chance, and so
        without it would be which of two budgets gets the lower peak."""
        cost = self._cost(rung) * (1 + RELATIVE_GAP)
        low = max((tried for tried in self._solved if tried < rung and self._cost(tried) > cost), default=-1)
        high = min((tried for tried in self._solved if low < tried <= rung and self._cost(tried) <= cost), default=rung)
        high, step = max(low + 1, self._reached(high)), 1
        while high - low > 1:
            tried = max(low + 1, high - step)
            if self._cost(tried) <= cost:
                high, step = max(low + 1, self._reached(tried)), 2 * step
            else:
                low, step = tried, 1
        return high

    def _reached(self, rung: int) -> int:
        """The lowest rung whose target this one's solution meets too."""
        low, high = self._ends
        return -(-(self._estimate(rung) - low) * self._rungs // max(1, high - low))

    def _cost(self, rung: int) -> float:
        levels = self._levels(rung)
        return math.inf if levels is None else self.problem.program.cost(levels)

    def _estimate(self, rung: int) -> int:
        """The solver's estimate of the peak of its solution; the target where there is none."""
        levels = self._levels(rung)
        return self._target(rung) if levels is None else self.problem.program.peak_bytes(levels)

    def _levels(self, rung: int) -> tuple[int, ...] | None:
        if rung not in self._solved:
            self._solved[rung] = self.problem.program.levels_within(self._target(rung))
        return self._solved[rung]

    def _rung(self, rung: int) -> tuple[Actions, Peak]:
        levels = self._levels(rung)
        if levels is None:
            return self._tightest
        if levels not in self._simulated:
            actions = self.problem.actions(levels)
            self._simulated[levels] = actions, self.analysis.estimate(actions)
        return self._simulated[levels]

    def _target(self, rung: int) -> int:
        low, high = self._ends
        return low + (high - low) * rung // self._rungs

    @property
    def _rungs(self) -> int:
        return COMPILED_RUNGS if self.analysis.is_compiled else RUNGS

    @cached_property
    def _solved(self) -> dict[int, tuple[int, ...] | None]:
        return {}

    @cached_property
    def _simulated(self) -> dict[tuple[int, ...], tuple[Actions, Peak]]:
        return {}

    @cached_property
    def _ends(self) -> tuple[int, int]:
        """The solver's estimates of the tightest and of the untouched peak."""
        program = self.problem.program
        return program.peak_bytes(highest_levels(program.items)), program.peak_bytes([0] * len(program.items))

    @cached_property
    def _end_errors(self) -> Mapping[int, int]:
        """How far below the simulated peaks these are, by rung."""
        low, high = self._ends
        return {0: self._bottom.tensor_bytes - low, self._rungs: self._untouched.tensor_bytes - high}

    @cached_property
    def _untouched(self) -> Peak:
        """The step with nothing done about it, simulated as its rivals are."""
        return with_overhead(self.analysis.untouched.peak, self.analysis.device)

    @cached_property
    def _bottom(self) -> Peak:
        """The peak of what the lowest rung of the ladder stands for."""
        return self.analysis.estimate(self.problem.actions(highest_levels(self.problem.items)))

    @cached_property
    def tightest(self) -> tuple[Actions, Peak]:
        """The actions of the smallest peak among: nothing, everything compressed, everything recomputed, both, and as
        little of both as the solver takes to be as good."""
        actions, _ = self._tightest
        return actions, self.analysis.peak(actions)

    @cached_property
    def _tightest(self) -> tuple[Actions, Peak]:
        found: list[tuple[Actions, Peak]] = []
        if self.problem.offered:
            for index in (-1,) if self.problem.sizes_matter else (0, -1):
                actions = self.problem.all_at(index)
                found.append((actions, self.analysis.estimate(actions)))
        if self.problem.blocks:
            alone = self.problem.all_recomputed()
            covered = () if self.analysis.is_factored else alone.recomputed
            besides = [c for c in self.problem.candidates if c.region not in covered]
            mixed = Actions({c.key: c.sizes[-1] for c in besides}, alone.recomputed)
            for actions in (alone, mixed) if besides else (alone,):
                found.append((actions, self.analysis.estimate(actions)))
            levels = self._levels(0)
            if levels is not None:
                actions = self.problem.actions(levels)
                found.append((actions, self.analysis.estimate(actions)))
        return min([*found, (Actions(), self._untouched)], key=lambda pair: pair[1].peak_bytes)
