"""What can be done about a step's memory, as an integer program."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from velora_fx.analyse import Actions, Analysis, Block, Candidate
from velora_fx.choose.items import Item, Moment
from velora_fx.choose.price import share_of
from velora_fx.choose.solver import Program
from velora_fx.choose.updates import Freed, find_freed
from velora_fx.runtime import Recompute
from velora_fx.simulate import Timeline

Stretch = tuple[int, int]  # first event, event after the last
Span = tuple[int, int, int]  # of an item: first event, event after the last, its index


@dataclass(frozen=True)
class Problem:
    """The solver's items and moments for the actions of the allowed kinds, and what a choice of levels stands for.

    `largest` bounds the sub-token sizes, None does not.
    """

    analysis: Analysis
    compresses: bool
    recomputes: bool
    largest: int | None = None

    @cached_property
    def offered(self) -> tuple[Candidate, ...]:
        """What may be compressed, at the sizes that are allowed."""
        found = self.analysis.candidates if self.compresses else ()
        if self.largest is None:
            return found
        most = self.largest
        bounded = (replace(c, sizes=tuple(size for size in c.sizes if size <= most)) for c in found)
        return tuple(candidate for candidate in bounded if candidate.sizes)

    @cached_property
    def candidates(self) -> tuple[Candidate, ...]:
        """Those; where blocks may be recomputed, only what belongs to one region."""
        if not self.recomputes:
            return self.offered
        return tuple(c for c in self.offered if len({saving.region for saving in c.savings}) == 1)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """What may be recomputed."""
        return tuple(b for b in self.analysis.blocks if self._gains[b.levels]) if self.recomputes else ()

    @cached_property
    def items(self) -> list[Item]:
        """The solver's items: candidates first, then blocks, then what depends on them."""
        return [item for item, _ in self._placed]

    @cached_property
    def program(self) -> Program:
        """What the solver solves: the items, and the moments of the trial step with those that are alive at each."""
        spans = [(*stretch, index) for index, (_, stretches) in enumerate(self._placed) for stretch in stretches]
        return Program(self.items, find_moments(self._trial, spans))

    @cached_property
    def _placed(self) -> list[tuple[Item, list[Stretch]]]:
        """The items, each with the stretches of the trial step in which it would free something.

        To recompute a block is instead of compressing in it, as a block that recomputes keeps no candidate. With
        factored gradients it is besides: gradients and optimizer states are tied to candidates all the same, and what
        both would free of a candidate is counted once.
        """
        blocks = {block.name: len(self.candidates) + number for number, block in enumerate(self.blocks)}
        inside = [blocks.get(candidate.region) for candidate in self.candidates]
        covers = [None] * len(inside) if self.analysis.is_factored else inside
        found = [
            (self._candidate_item(c, by), self._stretches_of(c)) for c, by in zip(self.candidates, covers, strict=True)
        ]
        found += [(self._block_item(block), [(block.first, block.end)]) for block in self.blocks]
        found += [(freed.item, [(freed.first, freed.end)]) for freed in self._freed]
        for index, block in enumerate(inside if self.analysis.is_factored else ()):
            if block is not None:
                candidate, stretches = found[index]
                twice = tuple(-saving for saving in candidate.savings)
                found.append((Item(("freed once", index), twice, (), tied_to=(index, block)), stretches))
        return found

    def _stretches_of(self, candidate: Candidate) -> list[Stretch]:
        """Of each storage: from its last use in forward to its end."""
        trial, last_uses = self._trial, self.analysis.findings.last_uses
        return [
            (last_uses.get(storage, trial.births[storage] + 1), trial.deaths.get(storage, len(trial.deltas)))
            for storage in candidate.storages
        ]

    @property
    def _trial(self) -> Timeline:
        assert self.analysis.findings.timeline is not None
        return self.analysis.findings.timeline

    def actions(self, levels: Sequence[int]) -> Actions:
        """What a choice of levels stands for."""
        chosen = list(levels)
        sizes = {c.key: c.sizes[level - 1] for c, level in zip(self.candidates, chosen, strict=False) if level}
        for_blocks = zip(self.blocks, chosen[len(self.candidates) :], strict=False)
        return Actions(sizes, {b.name: self._gains[b.levels][level - 1].level for b, level in for_blocks if level})

    def all_at(self, index: int) -> Actions:
        """Everything at the size of this index, or its last."""
        return Actions({c.key: c.sizes[min(index, len(c.sizes) - 1)] for c in self.offered})

    def cost(self, actions: Actions) -> float:
        """The price of the actions in seconds of a step: what recompute takes, and what the sub-tokens are worth."""
        chosen = [c for c in self.offered if c.key in actions.sizes]
        seconds = [self._price_of(c, actions.sizes[c.key]) for c in chosen]
        for block in self.blocks:
            gains = {gain.level: gain.seconds for gain in self._gains[block.levels]}
            if block.name in actions.recomputed:
                seconds.append(self._share_of(block) * gains[actions.recomputed[block.name]])
        return math.fsum(seconds)

    def all_recomputed(self) -> Actions:
        """All blocks recomputed as far as it frees more."""
        return Actions({}, {block.name: self._gains[block.levels][-1].level for block in self.blocks})

    @cached_property
    def projections_are_kept(self) -> bool:
        """False where compiled code makes projections again in backward, of what it keeps anyway.

        From forward to backward they take no memory then, whatever the sub-token size. The partitioner is free to: in
        forward nothing takes projections.
        """
        candidates = self.offered
        if not self.analysis.is_compiled or not candidates:
            return True
        at_start = [t.saved_bytes for t in (self.analysis.untouched, self.analysis.simulate(self.all_at(0)))]
        full = sum(candidate.bytes_before for candidate in candidates)
        projections = sum(candidate.bytes_after(candidate.sizes[0]) for candidate in candidates)
        return at_start[0] - at_start[1] < full - projections // 2

    @property
    def sizes_matter(self) -> bool:
        """False where all sub-token sizes free the same."""
        return self.projections_are_kept or self.analysis.is_factored

    def _candidate_item(self, candidate: Candidate, covered_by: int | None) -> Item:
        """Savings for each storage of the candidate, and the price of each size."""
        shapes = tuple(saving.shape for saving in candidate.savings)
        calls = max(1, len(candidate.storages))
        sizes = self._sizes_of(candidate)
        kept = [candidate.bytes_after(size) if self.projections_are_kept else 0 for size in sizes]
        return Item(
            group=(self._graphs_of(candidate.region), candidate.tensor, shapes),
            savings=tuple((candidate.bytes_before - after) // calls for after in kept),
            costs=tuple(self._price_of(candidate, size) for size in sizes),
            covered_by=covered_by,
        )

    def _price_of(self, candidate: Candidate, size: int) -> float:
        """Seconds of a step that a candidate's sub-tokens are as dear as."""
        all_weights = sum(c.num_weights for c in self.analysis.candidates)
        return share_of(size) * self.analysis.untouched.seconds * candidate.num_weights / all_weights

    def _sizes_of(self, candidate: Candidate) -> tuple[int, ...]:
        return candidate.sizes if self.sizes_matter else candidate.sizes[:1]

    @cached_property
    def _freed(self) -> tuple[Freed, ...]:
        sizes = [self._sizes_of(candidate) for candidate in self.candidates]
        return find_freed(self.analysis.findings, self.candidates, sizes) if self.analysis.is_factored else ()

    def _block_item(self, block: Block) -> Item:
        """Its part of what recomputing all blocks of its kind frees and costs in time."""
        share = self._share_of(block)
        gains = self._gains[block.levels]
        return Item(
            group=(self._graphs_of(block.name), block.levels),
            savings=tuple(int(share * gain.freed_bytes) for gain in gains),
            costs=tuple(share * gain.seconds for gain in gains),
        )

    def _share_of(self, block: Block) -> float:
        """Its part of what all blocks of its kind keep."""
        return block.kept_bytes / sum(b.kept_bytes for b in self.blocks if b.levels == block.levels)

    def _graphs_of(self, region: str) -> tuple[int, ...]:
        return tuple(id(graph) for graph in self.analysis.findings.graphs[region])

    @cached_property
    def _gains(self) -> Mapping[tuple[Recompute, ...], list[Gain]]:
        """What there is to gain of the blocks that may be recomputed in the same ways, by these."""
        alike: dict[tuple[Recompute, ...], list[str]] = {}
        for block in self.analysis.blocks:
            alike.setdefault(block.levels, []).append(block.name)
        return {levels: self._gains_of(names, levels) for levels, names in alike.items()}

    def _gains_of(self, blocks: Sequence[str], levels: Sequence[Recompute]) -> list[Gain]:
        """The levels of recomputation worth offering, each freeing more than the one before."""
        found: list[Gain] = []
        for level in levels:
            timeline = self.analysis.simulate(Actions({}, dict.fromkeys(blocks, level)))
            untouched = self.analysis.untouched
            freed = untouched.bytes_at_start_of("backward") - timeline.bytes_at_start_of("backward")
            # Under a compiler it can save time; to keep is better all the same where both fit.
            seconds = max(timeline.seconds, 1.0001 * untouched.seconds) - untouched.seconds
            if freed > (found[-1].freed_bytes if found else 0):
                found = [gain for gain in found if gain.seconds < seconds]
                found.append(Gain(level, freed, seconds))
        return found


@dataclass(frozen=True)
class Gain:
    """What recomputing blocks in this way frees at the start of backward, and the time that it takes."""

    level: Recompute
    freed_bytes: int
    seconds: float


def find_moments(timeline: Timeline, spans: Sequence[Span]) -> tuple[Moment, ...]:
    """Cuts a step where the set of items alive changes, and takes each stretch's peak.

    A span says when a storage that an item would free is alive; an item may have several.
    """
    end = len(timeline.deltas)
    cuts = sorted({0, *(min(start, end - 1) for start, _, _ in spans), *(stop for _, stop, _ in spans if stop < end)})
    peaks = np.maximum.reduceat(timeline.live_bytes, cuts)
    moments = []
    for cut, highest in zip(cuts, peaks.tolist(), strict=True):
        alive: dict[int, int] = {}
        for start, stop, index in spans:
            if start <= cut < stop:
                alive[index] = alive.get(index, 0) + 1
        moments.append(Moment(int(highest), tuple(sorted(alive.items()))))
    return tuple(moments)
