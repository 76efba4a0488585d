"""Writes the plan that actions amount to, with its notes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from velora_fx.analyse import Actions, Analysis, Candidate, autocast_in, weight_names
from velora_fx.choose.problem import Problem
from velora_fx.choose.search import Search
from velora_fx.choose.updates import updates_of
from velora_fx.devices import device_rates
from velora_fx.names import in_units
from velora_fx.options import Options
from velora_fx.passes.swap import CARRIER
from velora_fx.peaks import Peak
from velora_fx.plans import Decision, Exact, Plan, Recomputed

SAME = 0.01  # peaks that differ by less need no word
STATE_SHARE = 0.2  # of the peak, above which an optimizer that is given by name is spoken of


def write_plan(
    analysis: Analysis,
    problem: Problem,
    actions: Actions,
    planned: Peak,
    exact: Exact | None,
    budget_bytes: int | None,
    name: str,
    options: Options,
) -> Plan:
    """The plan that the actions amount to; `problem` is that of all actions that are allowed."""
    keeps = bool(actions.sizes) and problem.projections_are_kept
    decided = (*analysis.candidates, *(candidate for candidate in analysis.sharing if candidate.key in actions.sizes))
    consumers = {name for candidate in decided for name in candidate.consumers}
    plan = Plan(
        model=name,
        compiled=options.compiled or False,
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
        method=options.method,
        objective=options.objective,
        projection=options.projection,
        seed=options.seed,
        gradients=options.gradients,
        autocast=autocast_in(analysis.findings, analysis.device.type),
        torch_version=str(torch.__version__),
    )
    return replace(plan, notes=tuple(_notes(problem, plan, options)))


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


def _notes(problem: Problem, plan: Plan, options: Options) -> list[str]:
    analysis, held = problem.analysis, plan.planned.breakdown.get("optimizer", 0)
    notes = [*analysis.notes]
    if plan.planned.moment == "optimizer step":
        others = "" if plan.is_factored else "gradients='factored', "
        notes.append(
            "the peak is the optimizer step: what is kept for backward is gone by then, so compressing activations "
            f"does not lower it; a smaller optimizer state would ({others}optimizer='sgd', an 8-bit optimizer)"
        )
    if isinstance(options.optimizer, str) and held > STATE_SHARE * plan.planned.peak_bytes:
        notes.append(
            f"the state of {options.optimizer!r} is {in_units(held)} of the peak, as torch.optim has it: pass the "
            "class or the optimizer that you train with if it is another"
        )
    if analysis.findings.empty_caches and analysis.is_compiled:
        notes.append(
            "the model fills key-value caches in training, which a compiled model returns: "
            "model.config.use_cache = False frees them, exactly"
        )
    if plan.compressed and not problem.projections_are_kept:
        notes.append(
            "projections take no memory from forward to backward: compiled code makes them again, of what it keeps "
            "anyway"
        )
    if plan.compressed and analysis.findings.empty_caches:
        notes.append("compressed blocks are passed None for an empty key-value cache: in training it is never read")
    if problem.recomputes:
        notes += _overwritten(analysis)
    for name, reason in analysis.findings.failures.items():
        notes.append(f"{name or 'the model'} could not be captured as one region: {reason}")
    if plan.budget_bytes is None and problem.compresses:
        smallest = Search(analysis, True, False).tightest[1].peak_bytes
        notes.append(f"with everything compressed as far as possible the peak is {in_units(smallest)}")
    return [*notes, *_output_notes(analysis, plan)]


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


def _output_notes(analysis: Analysis, plan: Plan) -> list[str]:
    """What is assumed of the model's output, where another use of it makes a difference."""
    notes = []
    timeline = plan.planned.timeline or analysis.untouched
    more = timeline.peak_bytes_with_output - timeline.peak.peak_bytes
    if more > SAME * plan.planned.peak_bytes:
        peak_bytes = plan.planned.peak_bytes + more
        is_over = plan.budget_bytes is not None and plan.planned.peak_bytes <= plan.budget_bytes < peak_bytes
        notes.append(
            "the model's output is taken to be let go once the loss is made, as in model(**batch).loss.backward(); in "
            f"a loop that keeps it (out = model(**batch)) the peak is {in_units(peak_bytes)}"
            f"{', over the budget' if is_over else ''}"
        )
    if analysis.untouched.returned.float32_bytes:
        size = in_units(analysis.untouched.returned.float32_bytes)
        notes.append(
            "the loss is a stand-in, the mean square of the model's output; a cross-entropy may hold that output in "
            f"float32 more than once, each time {size}: pass loss_fn, or example_inputs with labels"
        )
    return notes
