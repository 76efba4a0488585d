"""What `optimize` leaves on a model: put there, found, and taken away again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from velora_fx.analyse import LARGEST_SUB_TOKEN, analyse
from velora_fx.capture_ahead import CaptureAhead
from velora_fx.choose import Planner, actions_of
from velora_fx.first_forward import FirstForward, Request, wait
from velora_fx.ops import without_wrappers
from velora_fx.peaks import Measured
from velora_fx.plans import Plan
from velora_fx.progress import planning_progress
from velora_fx.report.measured import mismatch_text
from velora_fx.runtime import (
    STATE,
    BatchWatch,
    Checkpointed,
    FactoredRegion,
    Folding,
    Measurement,
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
    """What `optimize` leaves on a model: its plan, its regions, its checkpointed blocks, and a pending measurement."""

    plan: Plan
    regions: list[Region]
    checkpointed: list[Checkpointed]
    measurement: Measurement | None = None

    @property
    def stand_ins(self) -> list[StandIn]:
        """What stands in for forwards: the regions and the checkpointed blocks."""
        return [*self.regions, *self.checkpointed]

    def take(self, measured: Measured) -> None:
        """Puts a real step into the plan, and warns of a plan that is far from it."""
        self.plan = replace(self.plan, measured=measured)
        self.measurement = None
        text = mismatch_text(self.plan)
        if text is not None:
            warnings.warn(f"velora_fx: {text}", stacklevel=5)


def apply(model: torch.nn.Module, request: Request, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Plans for the given call as requested and installs the result; a failure leaves the model as it was."""
    options = request.options
    if request.plan is not None:
        made_for = request.plan
        options = replace(options, projection=made_for.projection, seed=made_for.seed, gradients=made_for.gradients)
        options = replace(options, filter_fn=_filter_of(made_for), sub_token_sizes=_sizes_of(made_for))
    with planning_progress() as progress:
        analysis = analyse(model, args, kwargs, options, request.device, progress)
        if request.plan is not None:
            made, actions = request.plan, actions_of(request.plan, analysis)
        else:
            made, actions = Planner(analysis, type(model).__name__, options).plan(request.budget_bytes)
    before = vars(model).get(STATE)
    carriers = take_out(model)
    try:
        regions = install(model, analysis.region_plans(actions.sizes), options.seed, made.target)
        checkpointed = install_checkpointing(model, actions.recomputed)
        if request.projections:
            load_projections(regions, request.projections)
        elif options.projection == "batch_mean":
            calibrate(model, regions, args, kwargs)
    except BaseException:
        uninstall(model)
        remove_carriers(model)
        _put_back(model, before, carriers)
        raise
    made = replace(made, measured=None) if made.measured is not None else made  # that was another run
    installed = Installed(made, regions, checkpointed)
    setattr(model, STATE, installed)
    watch = _watch(model, installed)
    if options.measure:
        installed.measurement = Measurement(model, made.planned, made.device, watch.seen, installed.take)


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
        _watch(model, before)


def _filter_of(plan: Plan) -> Callable[[torch.nn.Module, str], bool]:
    """Lets the modules that the plan compresses be compressed: it may leave out others that read the same input."""
    consumers = {without_wrappers(name.partition("#")[0]) for item in plan.compressed for name in item.consumers}
    owners = {name.rpartition(".")[0] for name in consumers}  # of parameters that are no `weight`
    return lambda module, name: without_wrappers(name) in consumers | owners


def _sizes_of(plan: Plan) -> tuple[int, ...] | None:
    """Sizes to find what the plan compresses by: the usual ones, and any larger that it has."""
    larger = {d.sub_token_size for d in plan.compressed if (d.sub_token_size or 0) > LARGEST_SUB_TOKEN}
    return (*range(2, LARGEST_SUB_TOKEN + 1), *sorted(filter(None, larger))) if larger else None


def _watch(model: torch.nn.Module, installed: Installed) -> BatchWatch:
    if installed.plan.target == "inductor" and installed.regions:
        CaptureAhead(installed.regions).install(model)
    return watch_batches(model, {item.name: item.shape for item in installed.plan.inputs})


def apply_at_first_forward(model: torch.nn.Module, request: Request) -> None:
    """Has the model planned for, as requested, at its first training forward."""
    take_out(model)
    wait(model, request, apply)


def take_out(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Gives every module its own forward back, also those of optimised models that are parts of this one, and its
    weights their gradients; returns the carriers that stood for those."""
    taken = uninstall(model)
    for module in model.modules():
        state = vars(module).pop(STATE, None)
        if isinstance(state, Installed) and state.measurement is not None:
            state.measurement.cancel()
    foldings = {s.listener for s in taken if isinstance(s, FactoredRegion) and isinstance(s.listener, Folding)}
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
