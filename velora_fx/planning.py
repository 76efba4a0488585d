"""Chooses what to compress, and writes the plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from velora_fx.analysis import Analysis, Sizes
from velora_fx.candidates import Candidate
from velora_fx.options import Options
from velora_fx.overhead import overhead_bytes
from velora_fx.plans import BudgetError, Decision, Plan
from velora_fx.projection import without_wrappers
from velora_fx.report import in_units
from velora_fx.solver import Item, choose
from velora_fx.timeline import Peak

MAX_SIMULATIONS = 4


def make_plan(
    analysis: Analysis, budget_bytes: int | None, name: str, options: Options, device: torch.device
) -> tuple[Plan, Sizes]:
    """The plan of least approximation within the budget, checked by a simulation of the planned step.

    With no budget nothing is compressed. Raises BudgetError, with the tightest plan there is, if no plan fits.
    """
    sizes, planned = _search(analysis, budget_bytes)
    plan = write_plan(analysis, sizes, planned, budget_bytes, name, options, device)
    if not plan.fits:
        raise BudgetError(_unreachable(plan), plan)
    return plan, sizes


def _search(analysis: Analysis, budget_bytes: int | None) -> tuple[Sizes, Peak]:
    if budget_bytes is None or analysis.baseline.peak_bytes <= budget_bytes:
        return {}, analysis.baseline
    candidates = analysis.candidates
    items = [_item(analysis, candidate) for candidate in candidates]
    best: tuple[float, Sizes, Peak] | None = None
    tried = set()
    correction = 0
    for _ in range(MAX_SIMULATIONS):
        levels = choose(items, analysis.moments, budget_bytes - correction)
        if levels is None or levels in tried:
            break
        tried.add(levels)
        sizes = _sizes(candidates, levels)
        planned = analysis.simulate_plan(sizes)
        cost = sum(item.costs[level - 1] for item, level in zip(items, levels, strict=True) if level)
        if planned.peak_bytes <= budget_bytes and (best is None or cost < best[0]):
            best = cost, sizes, planned
        # The moments are those of a step with nothing compressed; the simulation is the truth.
        estimate = max(moment.bytes_at(items, levels) for moment in analysis.moments)
        correction = planned.peak_bytes - estimate
    if best is not None:
        return best[1], best[2]
    tightest = analysis.simulate_plan(_tightest(analysis))
    if tightest.peak_bytes > analysis.baseline.peak_bytes:
        return {}, analysis.baseline
    return _tightest(analysis), tightest


def _tightest(analysis: Analysis) -> Sizes:
    """Everything compressed as far as it can be."""
    return {candidate.key: candidate.sizes[-1] for candidate in analysis.candidates}


def _item(analysis: Analysis, candidate: Candidate) -> Item:
    """Savings for each storage of the candidate; the cost of a size M is numel(W) * log2(M)."""
    graphs = tuple(id(graph) for graph in analysis.findings.graphs[candidate.region])
    shapes = tuple(saving.shape for saving in candidate.savings)
    calls = len(candidate.storages)
    return Item(
        group=(graphs, candidate.tensor, shapes),
        savings=tuple((candidate.bytes_before - candidate.bytes_after(size)) // calls for size in candidate.sizes),
        costs=tuple(candidate.num_weights * math.log2(size) for size in candidate.sizes),
    )


def _sizes(candidates: Sequence[Candidate], levels: Sequence[int]) -> Sizes:
    return {c.key: c.sizes[level - 1] for c, level in zip(candidates, levels, strict=True) if level}


def sizes_of(plan: Plan, analysis: Analysis) -> Sizes:
    """The choice that a plan stands for, on a model that was analysed; ValueError if the plan is for another one."""
    candidates = {_names(candidate.consumers): candidate for candidate in analysis.candidates}
    sizes = {}
    for decision in plan.compressed:
        candidate = candidates.get(_names(decision.consumers))
        if candidate is None:
            reasons = [f" ({s.reason})" for s in analysis.skipped if s.module in decision.consumers]
            raise ValueError(
                f"the plan compresses the input of {', '.join(decision.consumers)}, which this model does not save "
                f"for its weights alone{''.join(reasons[:1])}: make the plan with this model and these inputs"
            )
        assert decision.sub_token_size is not None
        if candidate.savings[0].shape[-1] % decision.sub_token_size:
            raise ValueError(
                f"the plan's sub-token size {decision.sub_token_size} does not divide the input width "
                f"{candidate.savings[0].shape[-1]} of {decision.consumers[0]}"
            )
        sizes[candidate.key] = decision.sub_token_size
    return sizes


def _names(consumers: Sequence[str]) -> tuple[str, ...]:
    return tuple(without_wrappers(name) for name in consumers)


def write_plan(
    analysis: Analysis,
    sizes: Mapping[tuple[str, str], int],
    planned: Peak,
    budget_bytes: int | None,
    name: str,
    options: Options,
    device: torch.device,
) -> Plan:
    """The plan that the choice of sizes amounts to."""
    plan = Plan(
        model=name,
        target=options.target,
        device=str(device.type),
        optimizer=optimizer_name(options.optimizer),
        budget_bytes=budget_bytes,
        overhead_bytes=overhead_bytes(device),
        baseline=analysis.baseline,
        planned=planned,
        decisions=tuple(_decision(candidate, sizes.get(candidate.key)) for candidate in analysis.candidates),
        skipped=analysis.skipped,
        notes=(),
        projection=options.projection,
        seed=options.seed,
    )
    return replace(plan, notes=tuple(_notes(analysis, plan)))


def optimizer_name(optimizer: object) -> str:
    """How the report names the optimizer."""
    if isinstance(optimizer, str):
        return optimizer
    return optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__


def _decision(candidate: Candidate, size: int | None) -> Decision:
    first = candidate.savings[0]
    return Decision(
        region=candidate.region,
        tensor=candidate.tensor,
        consumers=candidate.consumers,
        shape=first.shape,
        dtype=str(first.dtype).removeprefix("torch."),
        action="keep" if size is None else "compress",
        sub_token_size=size,
        bytes_before=candidate.bytes_before,
        bytes_after=candidate.bytes_before if size is None else candidate.bytes_after(size),
    )


def _notes(analysis: Analysis, plan: Plan) -> list[str]:
    notes = list(analysis.notes)
    if plan.planned.moment == "optimizer step":
        notes.append(
            "the peak is the optimizer step: what is kept for backward is gone by then, so compressing activations "
            "does not lower it; a smaller optimizer state would (optimizer='sgd', an 8-bit optimizer)"
        )
    if plan.compressed and analysis.findings.empty_caches:
        notes.append("compressed blocks are passed None for an empty key-value cache: in training it is never read")
    for name, reason in analysis.findings.failures.items():
        notes.append(f"{name or 'the model'} could not be captured as one region: {reason}")
    if plan.budget_bytes is None:
        smallest = analysis.simulate_plan(_tightest(analysis)).peak_bytes
        notes.append(f"with everything compressed as far as possible the peak is {in_units(smallest)}")
    return notes


def _unreachable(plan: Plan) -> str:
    assert plan.budget_bytes is not None
    parts = ", ".join(f"{name} {in_units(size)}" for name, size in plan.planned.breakdown.items() if size)
    return (
        f"no plan fits {in_units(plan.budget_bytes)}: the smallest peak that can be reached is "
        f"{in_units(plan.planned.peak_bytes)} ({parts}, at the {plan.planned.moment}). "
        f"Try a larger budget, a smaller batch or sequence, gradient checkpointing, or an optimizer with less state"
    )
