"""The public functions."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch

from velora_fx.analyse import analyse, check_unwrapped, differences_of
from velora_fx.capture import example_call, find_regions
from velora_fx.choose import Planner
from velora_fx.first_forward import Request
from velora_fx.options import (
    Options,
    budget_bytes_of,
    options_from,
    planning_device,
    with_options,
)
from velora_fx.plans import Plan
from velora_fx.progress import planning_progress
from velora_fx.runtime import STATE, measured_step
from velora_fx.session import (
    Installed,
    apply_at_first_forward,
    apply_request,
    installed_on,
    load_projections,
    take_out,
    with_compiled,
)

Model = TypeVar("Model", bound=torch.nn.Module)


@with_options
def optimize(model: Model, budget_gb: float | str | None = None, example_inputs: Any = None, **options: Any) -> Model:
    """Makes one training step of the model fit a memory budget, in place, and returns the model.

    Activations that only weight gradients need are kept as rank-1 projections of sub-tokens (VeLoRA, arXiv 2405.17991),
    and blocks recompute in backward, where the budget needs it; outputs, input gradients and all other gradients stay
    exact. A step that fits as it is stays as it is.

    Args:
        budget_gb: peak memory of a step in GiB (2**30 bytes), as 24 or "24GiB": allocated bytes on CPU; on CUDA
            reserved memory with the CUDA context. "device" for all memory of the CUDA device.
        example_inputs: the largest batch: a dict of keyword arguments, a tuple of arguments or an (args, kwargs) pair
            of `model(...)`; or a list of such dicts, of which the largest counts. Without it, planning happens at the
            first training forward.
        method: "auto", whatever is cheapest; "compress", VeLoRA alone; "exact", recompute alone.
        compiled: True for a step of `torch.compile(model)`, "blocks" for one in which each repeated block is compiled
            by itself (`block.compile()`), False for an eager one; None finds out.
        optimizer: "adamw", "sgd", "none", an optimizer class, or an optimizer made from the model's parameters.

    Advanced:
        gradients: "dense", the `.grad` of each weight; or "factored": a compressed weight is frozen, and a parameter M
            times smaller beside it, `<weight name>_carrier`, has its gradient, optimizer state and share of the
            all-reduce; after each step the weight takes what the optimizer made of it, exactly the dense step. It needs
            example_inputs, before the optimizer, DDP or FSDP are made (docs/factored-gradients.md).
        objective: "memory"; or "speed", which also compresses wherever the predicted step gets faster, without a budget
            too.
        sub_token_sizes: the sizes M to choose from; by default divisors of each width between 2 and 128, small ones
            first, for speed up to 8.
        projection: "signs", random signs from `seed`, the same on every rank and in every run; "batch_mean", the
            paper's mean sub-token of the first batch, kept in `state_dict`.
        filter_fn: `filter_fn(module, name)` is True where the module's weight may get an approximate gradient; by
            default weights tied to an embedding and output heads over a vocabulary may not.
        loss_fn: the loss of the model's output, for planning; by default the output's `loss`, or a stand-in.
        gradient_accumulation: batches whose gradients are added up before each optimizer step.
        seed: seed of the projections.

    Raises:
        ValueError: bad arguments, or a model without a trainable matrix product.
        BudgetError: no plan fits; it carries the smallest reachable peak and the plan that reaches it.
        Whatever the model's own forward raises on the example inputs. The model is then as it was.
    """
    checked = options_from(options)
    if isinstance(budget_gb, Plan):
        raise ValueError("budget_gb is a Plan: velora_fx.apply(model, plan) applies one")
    if budget_gb is None and checked.objective == "memory":
        raise ValueError("optimize needs a budget: budget_gb=24, in GiB, or objective='speed'")
    _check_model(model)
    device = planning_device(model)
    budget_bytes = None if budget_gb is None else budget_bytes_of(budget_gb, device)
    _apply_or_wait(model, Request(checked, device, budget_bytes, None, {}), example_inputs)
    return model


@with_options
def plan(
    model: torch.nn.Module,
    budget_gb: float | str | None,
    example_inputs: Any,
    *,
    device: str | torch.device | None = None,
    **options: Any,
) -> Plan:
    """The plan that `optimize` would make, with the model left as it is; arguments and errors are those of `optimize`.

    `device` is what is planned for, "cpu" or "cuda", by default the model's own. Without a budget nothing is done for
    memory: the plan shows the step as it is. The model's weights are not read: one on the meta device can be planned
    for.
    """
    _check_model(model)
    checked = with_compiled(options_from(options), model)
    where = planning_device(model, device)
    budget_bytes = None if budget_gb is None else budget_bytes_of(budget_gb, where)
    check_unwrapped(model, checked.is_factored)
    args, kwargs = _checked_call(model, example_inputs)
    with planning_progress() as progress:
        analysis = analyse(model, args, kwargs, checked, where, progress)
        return Planner(analysis, type(model).__name__, checked).plan(budget_bytes)


def apply(model: Model, plan: Plan, example_inputs: Any = None) -> Model:
    """Applies a plan that was made before, in place, and returns the model: nothing is planned anew.

    The plan may come from `plan`, a BudgetError or `Plan.from_json`. With `example_inputs`, as `optimize` takes them,
    it is applied at once, else at the first training forward; factored gradients need them. Raises ValueError, with
    what differs, for a plan of another model, other inputs, another autocast or another version of PyTorch; the model
    is then as it was.
    """
    if not isinstance(plan, Plan):
        raise ValueError(f"plan must be a velora_fx.Plan, got {type(plan).__name__}: Plan.from_json reads one")
    _check_model(model)
    _apply_or_wait(model, _request_for(model, plan, {}), example_inputs)
    return model


def plan_of(model: torch.nn.Module) -> Plan:
    """The plan of an optimised model, also through `torch.compile` and DDP wrappers, with how much of it is in effect.

    Raises RuntimeError where there is none yet.
    """
    installed = installed_on(model)
    in_effect = installed.in_effect
    return installed.plan if in_effect is None else replace(installed.plan, in_effect=in_effect)


def restore(model: Model) -> Model:
    """Undoes `optimize`: every module gets its own forward back; a model that is not optimised stays as it is."""
    take_out(model)
    return model


@contextmanager
def measure(model: torch.nn.Module) -> Iterator[None]:
    """Measures the real peak of one training step of an optimised model, which runs within::

        with velora_fx.measure(model):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(velora_fx.plan_of(model))  # predicted beside measured

    The first step makes the optimizer's state: measure a later one. On CUDA the allocator's statistics are used, and
    its peaks set back; on CPU PyTorch's profiler. Warns of a plan that is off by more than 5%. Raises RuntimeError
    where no optimizer of the model stepped or another profiler ran, ValueError for a model on another device than
    planned for.
    """
    installed = installed_on(model)
    plan, watch = installed.plan, installed.watch
    watch.seen.clear()
    inputs: dict[int, int] = {}
    watch.inputs = inputs
    try:
        with measured_step(model, plan.planned, plan.device, installed.take, inputs):
            yield
    finally:
        watch.inputs = None


def state_dict(model: torch.nn.Module) -> dict[str, Any]:
    """What a checkpoint needs besides the model's own state: the plan, and projections made from data."""
    installed = installed_on(model)
    projections = {}
    if installed.plan.projection != "signs":
        projections = {
            f"{region.name}/{tensor}": v.clone()
            for region in installed.regions
            for tensor, v in region.projections.items()
        }
    return {"plan": installed.plan.to_dict(), "projections": projections}


def load_state_dict(model: Model, state: Mapping[str, Any], example_inputs: Any = None) -> Model:
    """Puts a state from `state_dict` into a model and returns it.

    An optimised model with the same decisions takes over the projections at once; any other model gets the saved plan
    as `apply` does it. Raises ValueError for a state that does not fit: where that shows at the first forward, the
    model is then as it was before.
    """
    if set(state) != {"plan", "projections"}:
        raise ValueError(f"a state of velora_fx.state_dict has the keys plan and projections, got {sorted(state)}")
    saved = Plan.from_dict(state["plan"])
    installed = vars(model).get(STATE)
    if isinstance(installed, Installed) and _what_is_installed(installed.plan) == _what_is_installed(saved):
        load_projections(installed.regions, state["projections"])
        return model
    _check_model(model)
    _apply_or_wait(model, _request_for(model, saved, dict(state["projections"])), example_inputs)
    return model


def _request_for(model: torch.nn.Module, plan: Plan, projections: Mapping[str, torch.Tensor]) -> Request:
    """The request to apply a plan."""
    options = Options(compiled=plan.compiled, gradients=plan.gradients, projection=plan.projection, seed=plan.seed)
    return Request(options, planning_device(model), None, plan, projections)


def _apply_or_wait(model: torch.nn.Module, request: Request, example_inputs: Any) -> None:
    check_unwrapped(model, request.options.is_factored)
    if example_inputs is not None:
        args, kwargs = _checked_call(model, example_inputs)
        differences = differences_of(request.plan, model, args, kwargs) if request.plan is not None else []
        if differences:
            raise ValueError(f"the plan is for another step: {'; '.join(differences)}: make it anew, for this one")
        apply_request(model, request, args, kwargs)
    elif request.options.is_factored:
        raise ValueError(
            "factored gradients need example_inputs: the optimizer, DDP and FSDP must find the carriers of the weights "
            "and are made before the first forward"
        )
    else:
        apply_at_first_forward(model, request)


def _what_is_installed(plan: Plan) -> tuple[Any, ...]:
    return plan.decisions, plan.recomputed, plan.projection, plan.seed, plan.gradients


def _check_model(model: torch.nn.Module) -> None:
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {model if isinstance(model, type) else type(model)}")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise ValueError("the model is wrapped by torch.compile: pass the model itself, and compile it afterwards")
    if not find_regions(model):
        raise ValueError(
            "the model has no trainable matrix product, so there is nothing to compress: "
            "check requires_grad of its parameters"
        )


def _checked_call(model: torch.nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = example_call(example_inputs)
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(f"example_inputs do not fit the forward of {type(model).__name__}: {error}") from error
    return args, kwargs
