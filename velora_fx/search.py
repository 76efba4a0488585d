"""The search for the actions of least cost that fit a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from velora_fx.analysis import Actions, Analysis
from velora_fx.blocks import Block
from velora_fx.candidates import Candidate
from velora_fx.checkpointing import Recompute
from velora_fx.moments import Span, find_moments
from velora_fx.overhead import tensors_within, with_overhead
from velora_fx.solver import RELATIVE_GAP, Item, Moment, choose, highest_levels
from velora_fx.timeline import Peak, Timeline
from velora_fx.updates import Freed, find_freed

RUNGS, COMPILED_RUNGS = 4096, 64  # a simulation of a compiled step compiles what is new in it
# Where time and approximation are traded: halving what is kept of every weight's input counts as much as this share of
# the step's time.
HALVING_PRICE = 0.02
LEVELS: tuple[Recompute, ...] = ("pointwise", "all")


@dataclass(frozen=True)
class Search:
    """Finds the cheapest actions of the allowed kinds, each result simulated: the simulation is the truth."""

    analysis: Analysis
    compresses: bool
    recomputes: bool

    def within(self, budget_bytes: int) -> tuple[Actions, Peak]:
        """The cheapest actions whose peak is within the budget; the tightest there are if none is.

        The solver knows the moments of a step with nothing done about it; a simulation tells the true peak of what it
        chose. Along a ladder of targets for the solver, the same for every budget, the highest rung that fits is
        searched by halving, so that a larger budget never gets a dearer plan, but for the solver's gap: one more
        approximate, where blocks are not recomputed. Taken is the lowest rung of the same cost, if it fits too.
        """
        tensor_budget_bytes = tensors_within(budget_bytes, self.analysis.device)
        if self.analysis.baseline.tensor_bytes <= tensor_budget_bytes:
            return Actions(), self.analysis.baseline
        if self._bottom[1].tensor_bytes > tensor_budget_bytes and self.tightest[1].tensor_bytes > tensor_budget_bytes:
            return self.tightest
        for is_trusted in (True, False):
            low, high = 0, self._rungs
            while high - low > 1:
                middle = (low + high) // 2
                fits = self._expected_to_fit(middle, tensor_budget_bytes) if is_trusted else None
                if fits is None:
                    fits = self._rung(middle)[1].tensor_bytes <= tensor_budget_bytes
                low, high = (middle, high) if fits else (low, middle)
            for rung in (self._lowest_alike(low), low):
                found = self._rung(rung)
                if found[1].tensor_bytes <= tensor_budget_bytes:
                    return found
        return self._at_one_size(tensor_budget_bytes)

    def _at_one_size(self, tensor_budget_bytes: int) -> tuple[Actions, Peak]:
        """What is left where every ladder is too short: projections that are not kept are still made in backward, and
        the larger the sub-tokens the less they take there."""
        most = max(len(candidate.sizes) for candidate in self.analysis.candidates) if self.compresses else 0
        for index in range(0 if self.sizes_matter else most):
            actions = self._all_at(index)
            peak = self._peak(actions)
            if peak.tensor_bytes <= tensor_budget_bytes:
                return actions, peak
        return self.tightest

    def _expected_to_fit(self, rung: int, tensor_budget_bytes: int) -> bool | None:
        """What needs no simulation: how far the solver's estimates are off is known at both ends of the ladder."""
        low, high = self._ends
        errors = self._bottom[1].tensor_bytes - low, self.analysis.baseline.tensor_bytes - high
        margin = abs(errors[1] - errors[0]) // 4 + (high - low) // self._rungs
        target = self._target(rung)
        if target + max(errors) + margin <= tensor_budget_bytes:
            return True
        return False if target + min(errors) - margin > tensor_budget_bytes else None

    def _lowest_alike(self, rung: int) -> int:
        """The lowest rung of the same cost: which of several solutions of that cost the solver finds is chance, and so
        without it would be which of two budgets gets the lower peak."""
        cost = self._cost(rung) * (1 + RELATIVE_GAP)
        low = max((tried for tried in self._solved if tried < rung and self._cost(tried) > cost), default=-1)
        high = min((tried for tried in self._solved if low < tried <= rung and self._cost(tried) <= cost), default=rung)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._cost(middle) <= cost else (middle, high)
        return high

    def _cost(self, rung: int) -> float:
        levels = self._levels(rung)
        if levels is None:
            return math.inf
        return math.fsum(
            item.costs[level - 1] for item, level in zip(self.items, levels, strict=True) if level and item.costs
        )

    def _levels(self, rung: int) -> tuple[int, ...] | None:
        if rung not in self._solved:
            self._solved[rung] = choose(self.items, self.moments, self._target(rung))
        return self._solved[rung]

    def _rung(self, rung: int) -> tuple[Actions, Peak]:
        levels = self._levels(rung)
        if levels is None:
            return self.tightest
        if levels not in self._simulated:
            actions = self.actions(levels)
            self._simulated[levels] = actions, self._peak(actions)
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
        levels = highest_levels(self.items)
        return (
            max(moment.bytes_at(self.items, levels) for moment in self.moments),
            max(moment.peak_bytes for moment in self.moments),
        )

    @cached_property
    def _bottom(self) -> tuple[Actions, Peak]:
        """What the lowest rung of the ladder stands for."""
        if self.sizes_matter or self.recomputes or not self.compresses:
            return self.tightest
        actions = self._all_at(0)
        return actions, self._peak(actions)

    @cached_property
    def tightest(self) -> tuple[Actions, Peak]:
        """The actions of the smallest peak among: nothing, everything compressed, everything recomputed, and both."""
        found: list[tuple[Actions, Peak]] = []
        if self.compresses and self.analysis.candidates:
            for index in (-1,) if self.sizes_matter else (0, -1):
                actions = self._all_at(index)
                found.append((actions, self._peak(actions)))
        if self.blocks:
            recomputed = self._recomputing(self._gains[-1].level).recomputed
            outside = [c for c in self.candidates if c.region not in recomputed]
            mixed = Actions({c.key: c.sizes[-1] for c in outside}, recomputed)
            for actions in (Actions({}, recomputed), mixed) if outside else (mixed,):
                found.append((actions, self.analysis.peak(actions)))
        return min([*found, (Actions(), self.analysis.baseline)], key=lambda pair: pair[1].peak_bytes)

    @cached_property
    def projections_are_kept(self) -> bool:
        """False where compiled code makes projections again in backward, of what it keeps anyway.

        From forward to backward they take no memory then, whatever the sub-token size. The partitioner is free to: in
        forward nothing takes projections.
        """
        candidates = self.analysis.candidates
        if not self.analysis.is_compiled or not candidates:
            return True
        at_start = [t.saved_bytes for t in (self.analysis.untouched, self._smallest_sub_tokens)]
        full = sum(candidate.bytes_before for candidate in candidates)
        projections = sum(candidate.bytes_after(candidate.sizes[0]) for candidate in candidates)
        return at_start[0] - at_start[1] < full - projections // 2

    @property
    def sizes_matter(self) -> bool:
        """False where all sub-token sizes free the same."""
        return self.projections_are_kept or self.analysis.is_factored

    @cached_property
    def _smallest_sub_tokens(self) -> Timeline:
        return self.analysis.simulate(self._all_at(0))

    def _peak(self, actions: Actions) -> Peak:
        """What is simulated already is not simulated again."""
        if self.analysis.is_compiled and actions == self._all_at(0):
            return with_overhead(self._smallest_sub_tokens.peak, self.analysis.device)
        return self.analysis.peak(actions)

    def _all_at(self, index: int) -> Actions:
        """Everything at the size of this index, or its last."""
        candidates = self.analysis.candidates
        return Actions({c.key: c.sizes[min(index, len(c.sizes) - 1)] for c in candidates})

    @cached_property
    def candidates(self) -> tuple[Candidate, ...]:
        """What may be compressed; where blocks may be recomputed, only what belongs to one region."""
        found = self.analysis.candidates if self.compresses else ()
        if not self.recomputes:
            return found
        return tuple(c for c in found if len({saving.region for saving in c.savings}) == 1)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """What may be recomputed."""
        return self.analysis.blocks if self.recomputes and self.analysis.blocks and self._gains else ()

    @cached_property
    def items(self) -> list[Item]:
        """The solver's items: candidates first, then blocks, which cover the candidates in them, then what factored
        gradients free, tied to candidates."""
        names = {block.name: len(self.candidates) + number for number, block in enumerate(self.blocks)}
        return [
            *(self._candidate_item(c, names.get(c.region)) for c in self.candidates),
            *(self._block_item(block) for block in self.blocks),
            *(freed.item for freed in self._freed),
        ]

    @cached_property
    def moments(self) -> tuple[Moment, ...]:
        """The moments of the trial step, with the items that are alive at each."""
        timeline = self.analysis.findings.timeline
        assert timeline is not None
        last_uses, end = self.analysis.findings.last_uses, len(timeline.deltas)
        spans: list[Span] = [
            (last_uses.get(storage, timeline.births[storage] + 1), timeline.deaths.get(storage, end), index)
            for index, candidate in enumerate(self.candidates)
            for storage in candidate.storages
        ]
        spans += [(b.first, b.end, len(self.candidates) + number) for number, b in enumerate(self.blocks)]
        spans += [
            (freed.first, freed.end, len(self.candidates) + len(self.blocks) + number)
            for number, freed in enumerate(self._freed)
        ]
        return find_moments(timeline, spans)

    def actions(self, levels: Sequence[int]) -> Actions:
        """What a choice of levels stands for."""
        chosen = list(levels)
        sizes = {c.key: c.sizes[level - 1] for c, level in zip(self.candidates, chosen, strict=False) if level}
        for_blocks = zip(self.blocks, chosen[len(self.candidates) :], strict=False)
        return Actions(sizes, {block.name: self._gains[level - 1].level for block, level in for_blocks if level})

    def _candidate_item(self, candidate: Candidate, covered_by: int | None) -> Item:
        """Savings for each storage of the candidate; the cost of a size M is numel(W) * log2(M)."""
        shapes = tuple(saving.shape for saving in candidate.savings)
        calls = max(1, len(candidate.storages))
        price = 1.0
        if self.recomputes:
            all_weights = sum(c.num_weights for c in self.candidates)
            price = HALVING_PRICE * self.analysis.untouched.seconds / all_weights
        sizes = self._sizes_of(candidate)
        kept = [candidate.bytes_after(size) if self.projections_are_kept else 0 for size in sizes]
        return Item(
            group=(self._graphs_of(candidate.region), candidate.tensor, shapes),
            savings=tuple((candidate.bytes_before - after) // calls for after in kept),
            costs=tuple(price * candidate.num_weights * math.log2(size) for size in sizes),
            covered_by=covered_by,
        )

    def _sizes_of(self, candidate: Candidate) -> tuple[int, ...]:
        return candidate.sizes if self.sizes_matter else candidate.sizes[:1]

    @cached_property
    def _freed(self) -> tuple[Freed, ...]:
        sizes = [self._sizes_of(candidate) for candidate in self.candidates]
        return find_freed(self.analysis.findings, self.candidates, sizes) if self.analysis.is_factored else ()

    def _block_item(self, block: Block) -> Item:
        """Its part of what recomputing all blocks frees and costs in time."""
        share = block.kept_bytes / sum(b.kept_bytes for b in self.blocks)
        return Item(
            group=(self._graphs_of(block.name),),
            savings=tuple(int(share * gain.freed_bytes) for gain in self._gains),
            costs=tuple(share * gain.seconds for gain in self._gains),
        )

    def _graphs_of(self, region: str) -> tuple[int, ...]:
        return tuple(id(graph) for graph in self.analysis.findings.graphs[region])

    @cached_property
    def _gains(self) -> list[Gain]:
        """The levels of recomputation worth offering, each freeing more than the one before."""
        found: list[Gain] = []
        for level in LEVELS:
            timeline = self.analysis.simulate(self._recomputing(level))
            untouched = self.analysis.untouched
            freed = untouched.bytes_at_start_of("backward") - timeline.bytes_at_start_of("backward")
            # Under a compiler it can save time; to keep is better all the same where both fit.
            seconds = max(timeline.seconds, 1.0001 * untouched.seconds) - untouched.seconds
            if freed > (found[-1].freed_bytes if found else 0):
                found = [gain for gain in found if gain.seconds < seconds]
                found.append(Gain(level, freed, seconds))
        return found

    def _recomputing(self, level: Recompute) -> Actions:
        return Actions({}, {block.name: level for block in self.analysis.blocks})


@dataclass(frozen=True)
class Gain:
    """What recomputing all blocks in this way frees at the start of backward, and the time that it takes."""

    level: Recompute
    freed_bytes: int
    seconds: float
