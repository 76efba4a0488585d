"""Simulated steps of a model with actions: few of its equal blocks, from which the others follow."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from velora_fx.analyse.actions import Actions
from velora_fx.analyse.candidates import Candidate, by_consumers
from velora_fx.analyse.probe import Findings
from velora_fx.analyse.region_plans import region_plans
from velora_fx.analyse.steps import Rehearsal
from velora_fx.capture import UnequalError
from velora_fx.runtime import Recompute, RegionPlan, install, install_checkpointing, uninstall
from velora_fx.simulate import Shortened, ShownStep, Timeline, lengthen, shorten
from velora_fx.simulate.compiled import ALL_JOINED

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
    """Simulates steps with actions on `candidates`, what is equal once."""

    rehearsal: Rehearsal
    findings: Findings
    candidates: Sequence[Candidate]
    progress: Callable[[str], None]
    _shown: dict[Hashable, ShownStep | None] = field(default_factory=dict)

    def __call__(
        self, actions: Actions, compiler_recomputes: bool = False, by_blocks: bool = False, as_one: bool = False
    ) -> Timeline:
        """The timeline of a step, as `Analysis` describes it."""
        found = None if as_one else self.lengthened(actions, compiler_recomputes, by_blocks)
        if found is not None:
            return found
        return self.whole(actions, compiler_recomputes, by_blocks, as_one)

    def whole(
        self, actions: Actions, compiler_recomputes: bool = False, by_blocks: bool = False, as_one: bool = False
    ) -> Timeline:
        """The same with every block simulated."""
        rehearsal, by_blocks = self.rehearsal, self._is_by_blocks(actions, by_blocks)

        def run(fake: torch.nn.Module) -> Timeline:
            if by_blocks:
                rehearsal.compile_blocks(fake, self.findings.graphs, compiler_recomputes)
            if by_blocks or not rehearsal.is_compiled:
                return rehearsal.eager_step(fake)
            return rehearsal.compiled_step(fake, self.findings.graphs, compiler_recomputes, as_one)

        return self._with(self._treatment(actions), rehearsal.fake_model(by_blocks), run)

    def lengthened(
        self, actions: Actions, compiler_recomputes: bool = False, by_blocks: bool = False
    ) -> Timeline | None:
        """The timeline of a step as it follows from one with few of its blocks; None where it does not."""
        rehearsal, by_blocks = self.rehearsal, self._is_by_blocks(actions, by_blocks)
        treatment = self._treatment(actions)
        is_whole = rehearsal.is_compiled and not by_blocks
        ends = {name for row in rehearsal.rows for name in (row[0], row[-1])} if is_whole else set()
        shortened = shorten(rehearsal.rows, lambda name: (treatment.of(name), name in ends))
        if not shortened.left_out or (is_whole and self._num_calls <= ALL_JOINED):
            return None
        shown = treatment.shown_by(shortened, rehearsal.rows)

        def run(fake: torch.nn.Module) -> ShownStep:
            graphs = self.findings.graphs
            if is_whole:
                return rehearsal.shown_compiled_step(fake, shortened, graphs, compiler_recomputes)
            if by_blocks:
                rehearsal.compile_blocks(fake, graphs, compiler_recomputes)
            return rehearsal.shown_step(fake, shortened)

        key = (
            tuple((name, _key(plan)) for name, plan in shown.plans.items()),
            tuple(sorted(shown.recomputed.items())),
            tuple(stretch.shown for stretch in shortened.stretches),
            (compiler_recomputes, by_blocks),
        )
        try:
            if key not in self._shown:
                self._shown[key] = None
                self._shown[key] = self._with(shown, rehearsal.fake_model(by_blocks, shortened), run)
            step = self._shown[key]
            return None if step is None else lengthen(step, shortened)
        except UnequalError as error:
            self.progress(f"equal blocks are simulated one by one: {error}")
            return None

    @property
    def _num_calls(self) -> int:
        """How often the step calls blocks of which there are several equal ones."""
        return sum(self.findings.calls.get(name, 0) for row in self.rehearsal.rows for name in row)

    def _is_by_blocks(self, actions: Actions, by_blocks: bool) -> bool:
        return self.rehearsal.is_compiled and (by_blocks or bool(actions.recomputed))

    def _treatment(self, actions: Actions) -> Treatment:
        compressed, is_factored = by_consumers(self.candidates, actions.sizes), self.rehearsal.options.is_factored
        return Treatment(region_plans(self.findings, compressed, is_factored), actions.recomputed)

    def _with(self, treatment: Treatment, fake: torch.nn.Module, run: Callable[[torch.nn.Module], Result]) -> Result:
        """What `run` makes of a fake model with the treatment installed."""
        self.progress("planned step")
        install(fake, treatment.plans, self.rehearsal.options.seed)
        install_checkpointing(fake, treatment.recomputed)
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
