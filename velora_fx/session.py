"""What `optimize` leaves on a model: put there, found, and taken away again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from velora_fx.analyse import analyse, captured, check_plan_fits, region_plans, with_traced_graphs
from velora_fx.capture import find_blocks
from velora_fx.capture_ahead import CaptureAhead
from velora_fx.choose import Planner
from velora_fx.first_forward import FirstForward, Request, wait
from velora_fx.ops import without_wrappers
from velora_fx.options import Options
from velora_fx.peaks import Measured
from velora_fx.plans import InEffect, Plan
from velora_fx.progress import planning_progress
from velora_fx.report import mismatch_text
from velora_fx.runtime import (
    STATE,
    BatchWatch,
    Checkpointed,
    FactoredRegion,
    Notices,
    Region,
    StandIn,
    calibrate,
    install,
    install_checkpointing,
    put_back,
    remove_carriers,
    uninstall,
    unwatch,
    watch_batches,
)


@dataclass
class Installed:
    """What `optimize` leaves on a model: its plan, its regions, its checkpointed blocks, the watch on its batches."""

    plan: Plan
    regions: list[Region]
    checkpointed: list[Checkpointed]
    watch: BatchWatch

    @property
    def stand_ins(self) -> list[StandIn]:
        """What stands in for forwards: the regions and the checkpointed blocks."""
        return [*self.regions, *self.checkpointed]

    @property
    def in_effect(self) -> InEffect | None:
        """What of the plan ran, None where nothing of it was called but in compiled code."""
        ours: list[Region | Checkpointed] = [*self.regions, *self.checkpointed]
        if not any(each.num_calls for each in ours):
            return None
        return InEffect(
            blocks=sum(each.num_in_effect > 0 for each in ours),
            all_blocks=len(ours),
            calls=sum(each.num_in_effect for each in ours),
            all_calls=sum(each.num_calls for each in ours),
        )

    def take(self, measured: Measured) -> None:
        """Puts a real step into the plan, and warns of a plan that is far from it."""
        self.plan = replace(self.plan, measured=replace(measured, inputs=dict(self.watch.seen)))
        text = mismatch_text(self.plan)
        if text is not None:
            warnings.warn(f"velora_fx: {text}", stacklevel=4)


def with_compiled(options: Options, model: torch.nn.Module) -> Options:
    """The options, where `compiled` was to be found out: "blocks" if repeated blocks of the model have been compiled,
    True if all of it or anything else in it has."""
    if options.compiled is not None:
        return options
    compiled = [module for module in model.modules() if module._compiled_call_impl is not None]
    blocks = {block for block in find_blocks(model).values() if block is not model}
    return replace(options, compiled="blocks" if compiled and blocks.issuperset(compiled) else bool(compiled))


def apply_request(model: torch.nn.Module, request: Request, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Plans for the given call, if the request has no plan, and installs the plan; a failure leaves the model as it
    was."""
    options = with_compiled(request.options, model)
    with planning_progress() as progress:
        if request.plan is None:
            analysis = analyse(model, args, kwargs, options, request.device, progress)
            findings = analysis.findings
            plan = Planner(analysis, type(model).__name__, options).plan(request.budget_bytes)
            if not options.compiled:  # not yet
                findings = with_traced_graphs(findings, analysis.simulate.rehearsal, progress)
        else:
            findings = captured(model, args, kwargs, options, request.device, progress)
            plan = request.plan
            check_plan_fits(plan, findings, dict(model.named_parameters(remove_duplicate=False)))
        compressed = [(item.consumers, item.sub_token_size or 0) for item in plan.compressed]
        regions_to_install = region_plans(findings, compressed, plan.is_factored)
    names = {without_wrappers(name): name for name, _ in model.named_modules()}
    before = vars(model).get(STATE)
    carriers, notices = take_out(model), Notices(plan)
    try:
        regions = install(model, regions_to_install, plan.seed, notices)
        recomputed = {names[without_wrappers(item.region)]: item.recompute for item in plan.recomputed}
        checkpointed = install_checkpointing(model, recomputed, notices)
        if request.projections:
            load_projections(regions, request.projections)
        elif plan.projection == "batch_mean":
            calibrate(model, regions, args, kwargs)
    except BaseException:
        uninstall(model)
        remove_carriers(model)
        _put_back(model, before, carriers)
        raise
    plan = replace(plan, measured=None)  # that was another run
    setattr(model, STATE, Installed(plan, regions, checkpointed, _watch(model, plan, regions)))


def _put_back(
    model: torch.nn.Module, before: Installed | FirstForward | None, carriers: Mapping[str, torch.nn.Parameter]
) -> None:
    """The inverse of `take_out`."""
    put_back(model, carriers)
    for stand_in in before.stand_ins if before is not None else ():
        stand_in.install()
    if before is not None:
        setattr(model, STATE, before)
    if isinstance(before, Installed):
        before.watch = _watch(model, before.plan, before.regions)


def _watch(model: torch.nn.Module, plan: Plan, regions: Sequence[Region]) -> BatchWatch:
    if plan.compiled and regions:
        CaptureAhead(regions).install(model)
    return watch_batches(model, {item.name: item.shape for item in plan.inputs})


def apply_at_first_forward(model: torch.nn.Module, request: Request) -> None:
    """Has the model planned for, as requested, at its first training forward."""
    take_out(model)
    wait(model, request, apply_request)


def take_out(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Gives every module its own forward back, also those of optimised models that are parts of this one, and its
    weights their gradients; returns the carriers that stood for those."""
    taken = uninstall(model)
    for module in model.modules():
        vars(module).pop(STATE, None)
    foldings = {stand_in.listener for stand_in in taken if isinstance(stand_in, FactoredRegion)}
    unwatch(model)
    carriers = remove_carriers(model)
    for folding in foldings:
        folding.retire(carriers.values())
    return carriers


def load_projections(regions: Sequence[Region], projections: Mapping[str, torch.Tensor]) -> None:
    """Puts saved projections, if there are any, into the regions; ValueError if they are for other tensors."""
    expected = {f"{region.name}/{tensor}" for region in regions for tensor in region.projections}
    if projections and set(projections) != expected:
        raise ValueError(
            f"the state's projections are for other tensors: {sorted(set(projections) ^ expected)[:3]} do not match"
        )
    for region in regions:
        for tensor in region.projections:
            if projections:
                region.set_projection(tensor, projections[f"{region.name}/{tensor}"])


def installed_on(model: torch.nn.Module) -> Installed:
    """What `optimize` left on the model or a module in it; RuntimeError if there is nothing yet."""
    for module in model.modules():  # wrappers hold the optimised model as a submodule
        state = vars(module).get(STATE)
        if isinstance(state, Installed):
            return state
        if isinstance(state, FirstForward):
            raise RuntimeError(
                "the model is not planned yet: planning happens at its first training forward; "
                "pass example_inputs to optimize to plan at once"
            )
    raise RuntimeError("the model is not optimised: call velora_fx.optimize first")
