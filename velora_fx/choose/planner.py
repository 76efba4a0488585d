"""Chooses what to compress, and writes the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from velora_fx.analyse import Actions, Analysis, Candidate, common_width, weight_names
from velora_fx.choose.exact import ExactRivals
from velora_fx.choose.output_notes import SAME, output_notes
from velora_fx.choose.search import Search
from velora_fx.choose.speed import approximation, faster
from velora_fx.choose.updates import updates_of
from velora_fx.devices import device_rates
from velora_fx.names import in_units
from velora_fx.ops import without_wrappers
from velora_fx.options import Options
from velora_fx.passes.swap import CARRIER
from velora_fx.peaks import Peak
from velora_fx.plans import BudgetError, Decision, Exact, Plan, Recomputed
from velora_fx.runtime import Recompute


@dataclass(frozen=True)
class Planner:
    """Makes plans for a model that was analysed, as many as there are budgets."""

    analysis: Analysis
    name: str
    options: Options

    def plan(self, budget_bytes: int | None) -> tuple[Plan, Actions]:
        """The plan of least approximation within the budget, checked by a simulation of the planned step.

        With no budget nothing is done for memory; for speed, what `max_approximation` allows. Raises BudgetError,
        with the tightest plan there is, if no plan fits, and with the cheapest that fits, if none does within
        `max_approximation`.
        """
        actions, planned, exact = Actions(), self.analysis.baseline, None
        if budget_bytes is not None:
            actions, planned = self.search.within(budget_bytes)
        most = self.options.max_approximation
        if most is not None and (budget_bytes is None or planned.peak_bytes <= budget_bytes):
            if approximation(self.analysis, actions.sizes) > most:
                actions, planned = self._exactly(budget_bytes) or (actions, planned)
            actions, planned = faster(self.analysis, actions, planned, budget_bytes, most)
        if budget_bytes is not None and actions.sizes:
            exact = self.rivals.within(budget_bytes)
        plan = write_plan(self.search, actions, planned, exact, budget_bytes, self.name, self.options)
        if not plan.is_within_budget:
            raise BudgetError(_unreachable(plan), plan)
        if not plan.is_within_approximation:
            raise BudgetError(self._too_approximate(plan), plan)
        return plan, actions

    def _exactly(self, budget_bytes: int | None) -> tuple[Actions, Peak] | None:
        """The actions that meet the budget by recompute alone, if that is allowed and enough: the cheapest actions may
        compress where those would do."""
        if budget_bytes is None or not self.options.recompute:
            return None
        actions, planned = self.rivals.checkpointing.within(budget_bytes)
        return (actions, planned) if planned.peak_bytes <= budget_bytes else None

    def _too_approximate(self, plan: Plan) -> str:
        assert plan.budget_bytes is not None
        budget = in_units(plan.budget_bytes)
        found, instead = f"within {budget} the least approximation is {plan.approximation:.6g}", ""
        if self.options.recompute:
            peak = self.rivals.checkpointing.within(plan.budget_bytes)[1]
            found = f"the cheapest plan within {budget} has approximation {plan.approximation:.6g}"
            instead = f", and recompute alone takes {in_units(peak.peak_bytes)} at the least"
        return f"{found}, and max_approximation is {plan.max_approximation:g}{instead}: allow more, or a larger budget"

    @cached_property
    def search(self) -> Search:
        """The search among the actions that are allowed."""
        options = self.options
        return Search(self.analysis, not options.exact_only, options.exact_only or options.recompute)

    @cached_property
    def rivals(self) -> ExactRivals:
        """What is compared with."""
        return ExactRivals(self.analysis)


def actions_of(plan: Plan, analysis: Analysis) -> Actions:
    """The actions that a plan stands for, on a model that was analysed; ValueError if the plan is for another one."""
    blocks = {without_wrappers(block.name): block for block in analysis.blocks}
    recomputed: dict[str, Recompute] = {}
    for item in plan.recomputed:
        block = blocks.get(without_wrappers(item.region))
        if block is None:
            raise ValueError(
                f"the plan recomputes {item.region}, which is no block of this model that can be run twice: make the "
                "plan with this model and these inputs"
            )
        if item.recompute not in block.levels:
            raise ValueError(
                f"the plan recomputes {item.region} {item.recompute}, and here results of matrix products in it are "
                f"written in place, so that it is recomputed {' or '.join(block.levels)}: make the plan with this model"
            )
        recomputed[block.name] = item.recompute
    candidates = {_names(candidate.consumers): candidate for candidate in analysis.compressible}
    sizes = {}
    for decision in plan.compressed:
        candidate = candidates.get(_names(decision.consumers))
        if candidate is None:
            reasons = [f" ({s.reason})" for s in analysis.skipped if s.module in decision.consumers]
            raise ValueError(
                f"the plan compresses the input of {', '.join(decision.consumers)}, which this model does not save "
                f"for its weights alone{''.join(reasons[:1])}{_apart(decision, analysis)}: make the plan with "
                "this model and these inputs"
            )
        assert decision.sub_token_size is not None
        if candidate.savings[0].shape[-1] != decision.shape[-1]:
            raise ValueError(
                f"the plan is for an input of {decision.consumers[0]} of width {decision.shape[-1]}, and here it has "
                f"{candidate.savings[0].shape[-1]}: make the plan with this model"
            )
        if common_width(candidate.savings) % decision.sub_token_size:
            widths = dict.fromkeys(saving.shape[-1] for saving in candidate.savings)
            raise ValueError(
                f"the plan's sub-token size {decision.sub_token_size} does not divide the input width "
                f"{', '.join(map(str, widths))} of {decision.consumers[0]}"
            )
        sizes[candidate.key] = decision.sub_token_size
    return Actions(sizes, recomputed)


def _apart(decision: Decision, analysis: Analysis) -> str:
    """How the input is kept here where that is only for some of the plan's linears, or for more: autocast does that."""
    names = set(_names(decision.consumers))
    here = [candidate.consumers for candidate in analysis.compressible if names & set(_names(candidate.consumers))]
    if not here:
        return ""
    is_on = torch.is_autocast_enabled(analysis.device.type)
    inputs = ", one of ".join(" and ".join(consumers) for consumers in here)
    return (
        f"; here there is an input of {inputs}, and autocast is "
        f"{'on' if is_on else 'off'}: under autocast each linear keeps a cast of its own, so plan under the autocast "
        "that you train with"
    )


def _names(consumers: Sequence[str]) -> tuple[str, ...]:
    return tuple(without_wrappers(name) for name in consumers)


def write_plan(
    search: Search,
    actions: Actions,
    planned: Peak,
    exact: Exact | None,
    budget_bytes: int | None,
    name: str,
    options: Options,
) -> Plan:
    """The plan that the actions amount to."""
    analysis = search.analysis
    keeps = bool(actions.sizes) and search.problem.projections_are_kept
    decided = (*analysis.candidates, *(candidate for candidate in analysis.sharing if candidate.key in actions.sizes))
    consumers = {name for candidate in decided for name in candidate.consumers}
    plan = Plan(
        model=name,
        target=options.target,
        device=str(analysis.device.type),
        optimizer=optimizer_name(options.optimizer),
        inputs=analysis.inputs,
        budget_bytes=budget_bytes,
        baseline=analysis.baseline,
        planned=planned,
        decisions=tuple(
            _decision(c, actions.sizes.get(c.key), keeps, num_bytes)
            for c, num_bytes in zip(decided, _update_bytes(decided, analysis, planned), strict=True)
        ),
        recomputed=tuple(Recomputed(name, recompute) for name, recompute in actions.recomputed.items()),
        exact=exact,
        rates=device_rates(analysis.device).name,
        skipped=tuple(skipped for skipped in analysis.skipped if skipped.module not in consumers),
        notes=(),
        objective=options.objective,
        approximation=approximation(analysis, actions.sizes),
        max_approximation=options.max_approximation,
        projection=options.projection,
        seed=options.seed,
        gradients=options.gradients,
    )
    return replace(plan, notes=tuple(_notes(search, actions, plan)))


def optimizer_name(optimizer: object) -> str:
    """How the report names the optimizer."""
    if isinstance(optimizer, str):
        return optimizer
    return optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__


def _update_bytes(candidates: Sequence[Candidate], analysis: Analysis, planned: Peak) -> list[tuple[int, int]]:
    """What gradients and optimizer state of each candidate's weights take, untouched and planned."""
    before, after = updates_of(analysis.untouched), updates_of(planned.timeline or analysis.untouched)
    found = []
    for candidate in candidates:
        names = weight_names(candidate.savings, analysis.findings)
        carried = [name + CARRIER if name + CARRIER in after else name for name in names]
        found.append((sum(before[n].num_bytes for n in names), sum(after[n].num_bytes for n in carried)))
    return found


def _decision(
    candidate: Candidate, size: int | None, keeps_projections: bool, update_bytes: tuple[int, int]
) -> Decision:
    first = candidate.savings[0]
    projection_bytes = candidate.bytes_after(size) if size is not None and keeps_projections else 0
    return Decision(
        region=candidate.region,
        tensor=candidate.tensor,
        consumers=candidate.consumers,
        shape=first.shape,
        dtype=str(first.dtype).removeprefix("torch."),
        action="keep" if size is None else "compress",
        sub_token_size=size,
        bytes_before=candidate.bytes_before,
        bytes_after=candidate.bytes_before if size is None else projection_bytes,
        update_bytes_before=update_bytes[0],
        update_bytes_after=update_bytes[1],
    )


def _notes(search: Search, actions: Actions, plan: Plan) -> list[str]:
    analysis = search.analysis
    notes = [*analysis.notes, *_regional_note(analysis, actions, plan)]
    if plan.planned.moment == "optimizer step":
        others = "" if plan.is_factored else "gradients='factored', "
        notes.append(
            "the peak is the optimizer step: what is kept for backward is gone by then, so compressing activations "
            f"does not lower it; a smaller optimizer state would ({others}optimizer='sgd', an 8-bit optimizer)"
        )
    if plan.recomputed and analysis.is_compiled:
        notes.append(
            "figures with recompute are those of blocks that are compiled one by one (block.compile()): "
            "torch.compile(model) may recompute several blocks at once and hold more"
        )
    if analysis.findings.empty_caches and analysis.is_compiled:
        notes.append(
            "the model fills key-value caches in training, which a compiled model returns: "
            "model.config.use_cache = False frees them, exactly"
        )
    if plan.compressed and not search.problem.projections_are_kept:
        notes.append(
            "projections take no memory from forward to backward: compiled code makes them again, of what it keeps "
            "anyway"
        )
    if plan.compressed and analysis.findings.empty_caches:
        notes.append("compressed blocks are passed None for an empty key-value cache: in training it is never read")
    if search.recomputes:
        notes += _overwritten(analysis)
    for name, reason in analysis.findings.failures.items():
        notes.append(f"{name or 'the model'} could not be captured as one region: {reason}")
    if plan.budget_bytes is None:
        smallest = Search(analysis, True, False).tightest[1].peak_bytes
        notes.append(f"with everything compressed as far as possible the peak is {in_units(smallest)}")
    return [*notes, *output_notes(analysis, plan)]


def _overwritten(analysis: Analysis) -> list[str]:
    """What is recomputed as a whole or not at all because something is written in place."""
    whole = [block.name for block in analysis.blocks if "pointwise" not in block.levels]
    never = [name for name in analysis.findings.graphs if name in analysis.findings.overwrites.inputs_of]
    return [
        *(
            f"{n or 'the model'} is recomputed whole or not: a matrix product's result is written in place"
            for n in whole
        ),
        *(f"{n or 'the model'} is not recomputed: what it is given is written in place" for n in never),
    ]


def _regional_note(analysis: Analysis, actions: Actions, plan: Plan) -> list[str]:
    """What the same step holds where blocks are compiled one by one, if that is another figure."""
    if not analysis.is_compiled or not analysis.has_blocks or actions.recomputed:
        return []
    peak_bytes = analysis.peak(actions, by_blocks=True).peak_bytes
    if abs(peak_bytes - plan.planned.peak_bytes) <= SAME * plan.planned.peak_bytes:
        return []
    is_over = plan.budget_bytes is not None and peak_bytes > plan.budget_bytes
    return [
        f"all figures are for torch.compile(model); with each block compiled by itself (block.compile()) the peak is "
        f"{in_units(peak_bytes)}{', over the budget' if is_over else ''}"
    ]


def _unreachable(plan: Plan) -> str:
    assert plan.budget_bytes is not None
    held = {**plan.planned.breakdown, **plan.planned.overhead}
    parts = ", ".join(f"{name} {in_units(size)}" for name, size in held.items() if size)
    others = "" if plan.is_factored else "gradients='factored', "
    return (
        f"no plan fits {in_units(plan.budget_bytes)}: the smallest peak that can be reached is "
        f"{in_units(plan.planned.peak_bytes)} ({parts}, at the {plan.planned.moment}). "
        f"Try a larger budget, a smaller batch or sequence, gradient checkpointing, {others}or an optimizer with less "
        "state"
    )
