"""Simulated steps of a model with actions: few of its equal blocks, from which the others follow."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from velora_fx.analyse.actions import Actions
from velora_fx.analyse.candidates import Candidate, by_consumers
from velora_fx.analyse.region_plans import region_plans
from velora_fx.analyse.trial import Findings, Rehearsal
from velora_fx.capture import UnequalError, undisturbed
from velora_fx.runtime import Notices, Recompute, RegionPlan, install, install_checkpointing, uninstall
from velora_fx.simulate import Timeline
from velora_fx.simulate.compiled import MOST_JOINED, all_calls, but_the_ends, inner_calls
from velora_fx.simulate.equal_blocks import Shortened, ShownStep, lengthen, shorten

Result = TypeVar("Result")


@dataclass(frozen=True)
class Treatment:
    """What is done about the regions of a model and about its blocks, by their names."""

    plans: Mapping[str, RegionPlan]
    recomputed: Mapping[str, Recompute]

    def of(self, block: str) -> Hashable:
        """What is done about a block, for comparison with others."""
        own = [(name[len(block) :], _key(plan)) for name, plan in self.plans.items() if _is_in(name, block)]
        levels = [(name[len(block) :], level) for name, level in self.recomputed.items() if _is_in(name, block)]
        return tuple(sorted(own, key=lambda pair: pair[0])), tuple(levels)

    def shown_by(self, shortened: Shortened, rows: Sequence[Sequence[str]]) -> Treatment:
        """The same about the blocks that are shown of a model with these rows of equal blocks."""
        blocks = {name: name for row in rows for name in row}
        shows = {name: shown for shown, name in shortened.stands_for.items()}

        def renamed(by_name: Mapping[str, Any]) -> dict[str, Any]:
            found = {}
            for name, value in by_name.items():
                block = next((b for b in _starts(name) if b in blocks), None)
                if block is None:
                    found[name] = value
                elif block in shows:
                    found[shows[block] + name[len(block) :]] = value
            return found

        return Treatment(renamed(self.plans), renamed(self.recomputed))


@dataclass(frozen=True)
class Simulator:
    """Simulates steps with actions on `candidates`, equal ones and what is equal in them once."""

    rehearsal: Rehearsal
    findings: Findings
    candidates: Sequence[Candidate]
    progress: Callable[[str], None]
    _timelines: dict[Hashable, Timeline] = field(default_factory=dict)
    _shown: dict[Hashable, ShownStep | None] = field(default_factory=dict)

    @undisturbed()
    def __call__(self, actions: Actions, joined: bool = False) -> Timeline:
        """The timeline of a step, as `Analysis` describes it."""
        joined = joined and self.rehearsal.is_traced
        key = frozenset(actions.sizes.items()), frozenset(actions.recomputed.items()), joined
        if key not in self._timelines:
            found = self.lengthened(actions, joined)
            self._timelines[key] = self.whole(actions, joined) if found is None else found
        return self._timelines[key]

    def whole(self, actions: Actions, joined: bool = False) -> Timeline:
        """The same with every block simulated."""
        rehearsal, graphs = self.rehearsal, self.findings.graphs

        def run(fake: torch.nn.Module) -> Timeline:
            if rehearsal.is_traced:
                return rehearsal.compiled_step(fake, graphs, inner_calls if joined else all_calls)
            if rehearsal.is_compiled:
                rehearsal.compile_blocks(fake, graphs)
            return rehearsal.eager_step(fake)

        return self._with(self._treatment(actions), rehearsal.fake_model(rehearsal.is_traced), run)

    def lengthened(self, actions: Actions, joined: bool = False) -> Timeline | None:
        """The timeline of a step as it follows from one with few of its blocks; None where it does not."""
        rehearsal, treatment = self.rehearsal, self._treatment(actions)
        ends = {name for row in rehearsal.rows for name in (row[0], row[-1])} if joined else set()
        shortened = shorten(rehearsal.rows, lambda name: (treatment.of(name), name in ends))
        if not shortened.left_out or (joined and self._num_calls <= MOST_JOINED):
            return None
        shown = treatment.shown_by(shortened, rehearsal.rows)

        def run(fake: torch.nn.Module) -> ShownStep:
            graphs = self.findings.graphs
            if rehearsal.is_traced:
                return rehearsal.shown_compiled_step(fake, shortened, graphs, but_the_ends if joined else all_calls)
            if rehearsal.is_compiled:
                rehearsal.compile_blocks(fake, graphs)
            return rehearsal.shown_step(fake, shortened)

        key = (
            tuple((name, _key(plan)) for name, plan in shown.plans.items()),
            tuple(sorted(shown.recomputed.items())),
            tuple(stretch.shown for stretch in shortened.stretches),
            joined,
        )
        try:
            if key not in self._shown:
                self._shown[key] = None
                self._shown[key] = self._with(shown, rehearsal.fake_model(rehearsal.is_traced, shortened), run)
            step = self._shown[key]
            return None if step is None else lengthen(step, shortened)
        except UnequalError as error:
            self.progress(f"equal blocks are simulated one by one: {error}")
            return None

    @property
    def _num_calls(self) -> int:
        """How often the step calls blocks of which there are several equal ones."""
        return sum(self.findings.calls.get(name, 0) for row in self.rehearsal.rows for name in row)

    def _treatment(self, actions: Actions) -> Treatment:
        compressed, is_factored = by_consumers(self.candidates, actions.sizes), self.rehearsal.options.is_factored
        return Treatment(region_plans(self.findings, compressed, is_factored), actions.recomputed)

    def _with(self, treatment: Treatment, fake: torch.nn.Module, run: Callable[[torch.nn.Module], Result]) -> Result:
        """What `run` makes of a fake model with the treatment installed."""
        self.progress("planned step")
        notices = Notices(None)
        install(fake, treatment.plans, self.rehearsal.options.seed, notices)
        install_checkpointing(fake, treatment.recomputed, notices)
        try:
            return run(fake)
        finally:
            uninstall(fake)  # and lets its carriers' optimizer go


def _key(plan: RegionPlan) -> Hashable:
    return tuple(map(id, plan.graphs)), tuple(plan.choices.items()), tuple(plan.widths.items())


def _is_in(name: str, block: str) -> bool:
    return name == block or name.startswith(f"{block}.")


def _starts(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
