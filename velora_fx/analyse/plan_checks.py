"""Whether a plan that is given is for this model and this call of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from velora_fx.analyse.factorable import not_factorable
from velora_fx.analyse.region_plans import products_of, width_of
from velora_fx.analyse.trial import Findings, full_name
from velora_fx.capture import attached_tensors, carriers_of, named_tensors, parameter_names
from velora_fx.devices import ALLOCATOR_BLOCK_BYTES
from velora_fx.names import in_units
from velora_fx.ops import without_wrappers
from velora_fx.plans import Input, Plan


def check_plan_fits(plan: Plan, findings: Findings, parameters: Mapping[str, torch.nn.Parameter]) -> None:
    """Raises ValueError, with what differs, for a plan of another model: other widths, weights that cannot have the
    plan's factored gradients, or blocks that cannot be recomputed as the plan has it.

    `parameters` are those of the model under all their names.
    """
    autocast = autocast_in(findings, plan.device)
    if autocast != plan.autocast:
        raise ValueError(
            f"the plan is for another step: autocast is {autocast or 'off'}, and was {plan.autocast or 'off'}: plan "
            "and apply within the autocast that you train with"
        )
    products = {
        without_wrappers(full_name(region, name)): product
        for region in findings.graphs
        for name, product in products_of(findings, region).items()
    }
    for decision in plan.compressed:
        product = products.get(without_wrappers(decision.consumers[0]))
        if product is not None and width_of(product) != decision.shape[-1]:
            raise ValueError(
                f"the plan is for an input of {decision.consumers[0]} of width {decision.shape[-1]}, and here it has "
                f"{width_of(product)}: make the plan with this model"
            )
    compressed = {without_wrappers(name) for decision in plan.compressed for name in decision.consumers}
    for use in findings.uses.values() if plan.is_factored else ():
        reason = not_factorable(parameters, findings.uses.values(), use)
        if reason is not None and without_wrappers(full_name(use.region, use.consumer)) in compressed:
            raise ValueError(
                f"the plan has a factored gradient of {full_name(use.region, use.parameter)}, and {reason}"
            )
    regions = {without_wrappers(name): name for name in findings.calls}
    for item in plan.recomputed:
        name = regions.get(without_wrappers(item.region))
        if name is None or not findings.graphs.get(name) or name in findings.overwrites.inputs_of:
            reason = findings.failures.get(name or "", "")
            raise ValueError(
                f"the plan recomputes {item.region}, which is no block of this model that can be run twice"
                f"{f' ({reason})' if reason else ''}: make the plan with this model and these inputs"
            )
        if item.recompute == "pointwise" and name in findings.overwrites.results_of:
            raise ValueError(
                f"the plan recomputes {item.region} pointwise, and here results of matrix products in it are written "
                "in place, so that it is recomputed whole: make the plan with this model"
            )


def inputs_of(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Input, ...]:
    """The tensors that a model is called with, by name."""
    tensors = named_tensors(parameter_names(model), args, kwargs)
    return tuple(Input(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors)


def autocast_in(findings: Findings, device_type: str) -> str | None:
    """The dtype of the autocast that the regions were called under, as "bfloat16"; None where it was off.

    A trainer may turn it on within the model's forward.
    """
    keys = (graph.key for graphs in findings.graphs.values() for graph in graphs)
    states = [(enabled, dtype) for key in keys for kind, enabled, dtype in key[4] if kind == device_type]
    return next((str(dtype).removeprefix("torch.") for enabled, dtype in states if enabled), None)


def differences_of(plan: Plan, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """In what a call of a model differs from the step that a plan is for, in words."""
    found = []
    here = {item.name: item for item in inputs_of(model, args, kwargs)}
    planned = {item.name: item for item in plan.inputs}
    for name in dict.fromkeys((*planned, *here)):
        if here.get(name) != planned.get(name):
            found.append(f"{name} is {_text(here.get(name))}, and was {_text(planned.get(name))}")
    before, after = plan.baseline.breakdown.get("parameters", 0), parameter_bytes(model, plan.device)
    if before != after:
        found.append(f"the parameters take {in_units(after)}, and took {in_units(before)}")
    now = torch.__version__.split(".")[:2]
    if plan.torch_version.split(".")[:2] != now:
        found.append(f"PyTorch is {torch.__version__}, and was {plan.torch_version or 'unknown'}")
    return found


def parameter_bytes(model: torch.nn.Module, device_type: str) -> int:
    """Bytes of a model's parameters in the blocks of a device's allocator, shared storages once, carriers left out."""
    carriers = {id(carrier) for carrier in carriers_of(model).values()}
    tensors = [t for p in model.parameters() if id(p) not in carriers for t in (p, *attached_tensors(p))]
    storages = {id(storage): storage for tensor in tensors for storage in [tensor.untyped_storage()]}
    block = ALLOCATOR_BLOCK_BYTES.get(device_type, 1)
    return sum(-(-storage.nbytes() // block) * block for storage in storages.values())


def _text(item: Input | None) -> str:
    return "left out" if item is None else " ".join([" x ".join(map(str, item.shape)), item.dtype]).strip()
