"""The public functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from velora_fx.analyse import analyse, check_unwrapped
from velora_fx.capture import example_call, find_regions
from velora_fx.choose import Planner
from velora_fx.first_forward import Request
from velora_fx.options import Options, budget_bytes_of, planning_device
from velora_fx.plans import Plan
from velora_fx.progress import planning_progress
from velora_fx.runtime import STATE
from velora_fx.session import (
    Installed,
    apply,
    apply_at_first_forward,
    installed_on,
    load_projections,
    take_out,
)

Model = TypeVar("Model", bound=torch.nn.Module)


def optimize(
    model: Model,
    budget_gb: float | str | None = None,
    example_inputs: Any = None,
    *,
    plan: Plan | None = None,
    optimizer: Any = "adamw",
    target: str | None = None,
    gradients: str = "dense",
    projection: str = "signs",
    sub_token_sizes: Sequence[int] | None = None,
    filter_fn: Callable[[torch.nn.Module, str], bool] | None = None,
    loss_fn: Callable[[Any], torch.Tensor] | None = None,
    gradient_accumulation: int = 1,
    exact_only: bool = False,
    recompute: bool = False,
    objective: str = "memory",
    max_approximation: float | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    measure: bool = False,
) -> Model:
    """Makes one training step of the model fit a memory budget, in place, and returns the model.

    Activations that only weight gradients need are kept as rank-1 projections of sub-tokens where the budget needs
    it (VeLoRA, arXiv 2405.17991); outputs, input gradients and all other gradients stay exact.

    Args:
        budget_gb: peak memory of a step in GiB (2**30 bytes): allocated bytes on CPU; on CUDA reserved memory with
            the CUDA context, the plan's tensors plus its `overhead` by name. "device" for all memory of the CUDA
            device: tensors get what the overhead leaves of it. More than the device has is warned of.
        example_inputs: the largest batch to plan for: a dict of keyword arguments, a tuple of arguments or an
            (args, kwargs) pair of `model(...)`. Without it, planning happens at the first training forward, and
            `torch.compile(fullgraph=True)` has to wait until then.
        plan: a plan to apply instead of a budget, as `plan` or `BudgetError.plan` gives it.
        optimizer: "adamw", "sgd", "none", an optimizer class, or an optimizer made from the model's parameters.
        target: how the step will run: "eager", or "inductor" for `torch.compile(model)`; by default that of `plan`, or
            "eager".
        gradients: "dense", the ordinary `.grad` of each weight; or "factored": a compressed weight is frozen, and a
            parameter M times smaller beside it, `<weight name>_carrier`, has its gradient dYᵀz, optimizer state and
            share of the all-reduce. After each step the weight takes what the optimizer has made of it: exactly the
            dense step. Call `optimize` with example_inputs before the optimizer, DDP or FSDP are made. Exact for
            elementwise optimizers without coupled weight decay (others raise RuntimeError at their first step, before
            they change anything), for accumulation, `GradScaler` and `clip_grad_norm_` in the 2-norm, not for
            `clip_grad_value_`. A use of a compressed weight outside of its own product, such as a penalty in the loss,
            has no gradient.
        projection: "signs", random signs from `seed`, the same on every rank and in every run; "batch_mean", the
            paper's mean sub-token of the example inputs or of the first training batch, kept in `state_dict`.
        sub_token_sizes: the sizes M to choose from; by default divisors of each width between 2 and 128.
        filter_fn: `filter_fn(module, name)` is True where the module's weight may get an approximate gradient; by
            default weights tied to an embedding and output heads over a vocabulary may not.
        loss_fn: the loss of the model's output, for planning; by default the output's `loss`, or a stand-in.
        gradient_accumulation: batches whose gradients are added up before each optimizer step.
        exact_only: never compress; blocks recompute in backward what the budget does not let them keep, by
            `torch.utils.checkpoint`: norms and activations first, all of the block where that is not enough.
        recompute: blocks may be recomputed besides, priced by the time it takes.
        objective: "memory", the least approximation that fits the budget; "speed", besides that, compression wherever
            the predicted time of the step falls, also of inputs that free no memory. It needs no budget.
        max_approximation: how far "speed" may go: the mean log2 of the sub-token size over the entries of all weights
            that may be compressed; 5 allows sub-tokens of 32 for every one, or larger ones for some.
        device: what is planned for, "cpu" or "cuda"; by default the model's device.
        seed: seed of the projections.
        measure: measure the real peak, once, from the end of the first optimizer step to the end of the second: on
            CUDA by the allocator's statistics, with `torch.cuda.reset_peak_memory_stats`; on CPU by PyTorch's profiler:
            do not start another one in that step. Then `plan_of(model).measured` holds it, and a warning tells of a
            plan that is off by more than 5%.

    Raises:
        ValueError: bad arguments, or a model without a trainable matrix product.
        BudgetError: no plan fits; it carries the smallest reachable peak and the plan that reaches it, whatever
            `max_approximation` is; where that is all that stands in the way, the cheapest plan within the budget.
        Whatever the model's own forward raises on the example inputs. The model is then as it was.
    """
    options = Options(
        optimizer=optimizer, target=_target_of(target, plan), gradients=gradients, projection=projection,
        sub_token_sizes=sub_token_sizes, filter_fn=filter_fn, loss_fn=loss_fn, device=device, seed=seed,
        gradient_accumulation=gradient_accumulation, exact_only=exact_only, recompute=recompute,
        objective=objective, max_approximation=max_approximation,
        measure=measure,
    )  # fmt: skip
    _apply_or_wait(model, _request(model, options, budget_gb, plan), example_inputs)
    return model


def plan(
    model: torch.nn.Module,
    budget_gb: float | str | None,
    example_inputs: Any,
    *,
    optimizer: Any = "adamw",
    target: str = "eager",
    gradients: str = "dense",
    projection: str = "signs",
    sub_token_sizes: Sequence[int] | None = None,
    filter_fn: Callable[[torch.nn.Module, str], bool] | None = None,
    loss_fn: Callable[[Any], torch.Tensor] | None = None,
    gradient_accumulation: int = 1,
    exact_only: bool = False,
    recompute: bool = False,
    objective: str = "memory",
    max_approximation: float | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
) -> Plan:
    """The plan that `optimize` would make, with the model left as it is; arguments and errors are those of `optimize`.

    Without a budget nothing is compressed, but for speed: the plan shows the step as it is. The model's weights are not
    read: a model on the meta device can be planned for.
    """
    options = Options(
        optimizer=optimizer, target=target, gradients=gradients, projection=projection,
        sub_token_sizes=sub_token_sizes, filter_fn=filter_fn, loss_fn=loss_fn, device=device, seed=seed,
        gradient_accumulation=gradient_accumulation, exact_only=exact_only, recompute=recompute,
        objective=objective, max_approximation=max_approximation,
    )  # fmt: skip
    where = planning_device(model, options)
    budget_bytes = None if budget_gb is None else budget_bytes_of(budget_gb, where)
    _check_model(model)
    check_unwrapped(model, options.is_factored)
    args, kwargs = _checked_call(model, example_inputs)
    with planning_progress() as progress:
        analysis = analyse(model, args, kwargs, options, where, progress)
        return Planner(analysis, type(model).__name__, options).plan(budget_bytes)[0]


def plan_of(model: torch.nn.Module) -> Plan:
    """The plan of an optimised model, also through `torch.compile` and DDP wrappers.

    Raises RuntimeError where there is none yet.
    """
    return installed_on(model).plan


def restore(model: Model) -> Model:
    """Undoes `optimize`: every module gets its own forward back; a model that is not optimised stays as it is."""
    take_out(model)
    return model


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

    An optimised model with the same decisions takes over the projections at once; any other model is prepared to
    apply the saved plan at its first training forward or, with example_inputs as `optimize` takes them, at once. A plan
    with factored gradients needs them: the optimizer has to find the carriers. Raises ValueError for a state that does
    not fit: where that shows at the first forward, the model is then as it was before.
    """
    if set(state) != {"plan", "projections"}:
        raise ValueError(f"a state of velora_fx.state_dict has the keys plan and projections, got {sorted(state)}")
    saved = Plan.from_dict(state["plan"])
    installed = vars(model).get(STATE)
    if isinstance(installed, Installed) and _what_is_installed(installed.plan) == _what_is_installed(saved):
        load_projections(installed.regions, state["projections"])
        return model
    options = Options(projection=saved.projection, seed=saved.seed, target=saved.target)
    _check_model(model)
    request = Request(options, planning_device(model, options), None, saved, dict(state["projections"]))
    _apply_or_wait(model, request, example_inputs)
    return model


def _apply_or_wait(model: torch.nn.Module, request: Request, example_inputs: Any) -> None:
    is_factored = request.options.is_factored or (request.plan is not None and request.plan.is_factored)
    check_unwrapped(model, is_factored)
    if example_inputs is not None:
        apply(model, request, *_checked_call(model, example_inputs))
    elif is_factored:
        raise ValueError(
            "factored gradients need example_inputs: the optimizer, DDP and FSDP must find the carriers of the weights "
            "and are made before the first forward"
        )
    else:
        apply_at_first_forward(model, request)


def _target_of(target: str | None, plan: Plan | None) -> str:
    """The target that is asked for, by default that of the plan; ValueError where they differ."""
    own = plan.target if isinstance(plan, Plan) else None
    if target is not None and own is not None and target != own:
        raise ValueError(f"the plan is for target={own!r}, got target={target!r}: leave it out, or make another plan")
    return target or own or "eager"


def _what_is_installed(plan: Plan) -> tuple[Any, ...]:
    return plan.decisions, plan.recomputed, plan.projection, plan.seed, plan.gradients


def _request(model: torch.nn.Module, options: Options, budget_gb: float | str | None, plan: Plan | None) -> Request:
    if plan is not None and options.objective != "memory":
        raise ValueError("a plan says what is compressed: leave out objective and max_approximation")
    if (budget_gb is None) == (plan is None) and (plan is not None or options.objective == "memory"):
        got = "neither: pass budget_gb (in GiB) or a plan" if plan is None else "both"
        raise ValueError(f"optimize takes either budget_gb or plan, got {got}")
    if plan is not None and not isinstance(plan, Plan):
        raise ValueError(f"plan must be a velora_fx.Plan, got {type(plan).__name__}")
    if plan is not None and options.is_factored and not plan.is_factored:
        raise ValueError("the plan is for dense gradients: make it with gradients='factored', or leave that out here")
    if plan is not None and plan.compressed and options.exact_only:
        raise ValueError("exact_only never compresses, and the plan does: leave one of them out")
    device = planning_device(model, options)
    budget_bytes = None if budget_gb is None else budget_bytes_of(budget_gb, device)
    _check_model(model)
    return Request(options, device, budget_bytes, plan, {})


def _check_model(model: torch.nn.Module) -> None:
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
