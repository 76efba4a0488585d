"""One training step of a fake model under the tracker."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils import _pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from velora_fx.capture import attached_tensors, named_tensors, tensors_inside
from velora_fx.devices import ALLOCATOR_BLOCK_BYTES
from velora_fx.runtime import OptimizerFactory
from velora_fx.simulate.fake import as_compiled
from velora_fx.simulate.finite_values import FiniteValues, place_in
from velora_fx.simulate.kernels import RealKernels, kernels_of
from velora_fx.simulate.module_scopes import Scopes
from velora_fx.simulate.roofline import StepTimer
from velora_fx.simulate.timeline import Returned, Timeline
from velora_fx.simulate.tracker import Tracker

NO_NUMPY = ".numpy() is not supported for tensor subclasses"  # what fake tensors say


def simulate(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    input_names: Sequence[str],
    make_optimizer: OptimizerFactory,
    loss_fn: Callable[[Any], torch.Tensor],
    device: torch.device,
    timer: StepTimer,
    accumulates: bool = False,
    tracker: Tracker,
    checks: set[str] | None = None,
) -> Timeline:
    """Runs forward, loss, backward and optimizer step of a fake model, and returns memory over the step and its time.

    The step is one in the middle of training: the optimizer has its state, gradients were set to None before. With
    `accumulates` it is the last of several batches: the gradients of the others are there and are added to.
    `checks` gets the places in the code that ask whether values are finite, and are told that they are.
    """
    optimizer = make_optimizer(model)
    if optimizer is not None:
        _prime(optimizer)
    if accumulates:
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    _watch_state(model, optimizer, tracker)
    for name, tensor in named_tensors(input_names, args, kwargs):
        tracker.watch(tensor, "activations", name)
    before = set(tracker.live())
    timer.seconds = 0.0
    scopes = tracker.scopes.on() if tracker.scopes else contextlib.nullcontext()
    with (
        torch.random.fork_rng(devices=[]),
        torch.enable_grad(),
        scopes,
        kernels_of(device, timer, tracker) as kernels,
        FiniteValues(checks),
        _generator_states(kernels, tracker) if device.type == "cpu" else contextlib.nullcontext(),
    ):
        tracker.mark("forward")
        loss, returned = _loss(lambda: model(*args, **kwargs), loss_fn, tracker)
        tracker.mark("backward")
        for storage in tracker.live():
            if storage not in before:
                tracker.categories[storage] = "activations"
        with _without_autocast():
            _backward(loss)
            _watch_gradients(model, tracker)
            del loss
            tracker.mark("optimizer step")
            if optimizer is not None:
                _optimizer_step(optimizer)
    _discount_unused_state(optimizer, tracker)
    return replace(tracker.timeline(), seconds=timer.seconds, returned=returned)


def _loss(
    forward: Callable[[], Any], loss_fn: Callable[[Any], torch.Tensor], tracker: Tracker
) -> tuple[torch.Tensor, Returned]:
    """The loss, and what the forward returned, which is let go: `model(**batch).loss.backward()`, as trainers do."""
    output = _run_forward(forward)
    returned = Returned(tracker.now, tuple({tracker.watch(tensor): None for tensor in _held_by(output)}))
    if loss_fn is default_loss and own_loss(output) is None:
        returned = replace(returned, float32_bytes=4 * sum(t.numel() for t in _trained(output)))
    loss = _checked_loss(_run_forward(partial(loss_fn, output)))
    tracker.name_loss(loss)
    return loss, returned


def _discount_unused_state(optimizer: torch.optim.Optimizer | None, tracker: Tracker) -> None:
    """In training there would be no state of a parameter that has no gradient."""
    for parameter, state in optimizer.state.items() if optimizer is not None else ():
        for value in state.values() if parameter.grad is None else ():
            if isinstance(value, torch.Tensor):
                tracker.discount(value)


@contextlib.contextmanager
def _generator_states(kernels: RealKernels, tracker: Tracker) -> Iterator[None]:
    """Counts the states of the CPU's generator that checkpoints keep: they are real, and no operator makes them.

    Where the kernels are off, code is compiled, which has such states of its own; where nothing runs in a checkpoint,
    none is kept.
    """
    original = torch.get_rng_state

    def watched() -> torch.Tensor:
        state = original()
        if kernels in _get_current_dispatch_mode_stack():
            tracker.watch_if_kept(state)
        return state

    torch.get_rng_state = watched
    try:
        yield
    finally:
        torch.get_rng_state = original


@contextlib.contextmanager
def _without_autocast() -> Iterator[None]:
    """Leaves an ambient autocast, as training code does before backward: the casts of weights that it keeps go."""
    torch.clear_autocast_cache()
    enabled = {kind: torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")}
    try:
        for kind in enabled:
            torch.set_autocast_enabled(kind, False)
        yield
    finally:
        for kind, was_enabled in enabled.items():
            torch.set_autocast_enabled(kind, was_enabled)


def make_tracker(model: torch.nn.Module, device: torch.device) -> Tracker:
    """The tracker of a step of this model on a device."""
    return Tracker(ALLOCATOR_BLOCK_BYTES.get(device.type, 1), Scopes(model))


def _watch_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, tracker: Tracker) -> None:
    """What is there before the step, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items() if optimizer is not None else ():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tracker.watch(value, "optimizer", f"{key} of {names.get(id(parameter), 'a parameter')}")
    for name, parameter in model.named_parameters():
        tracker.watch(parameter, "parameters", name)
        for attached in attached_tensors(parameter):
            tracker.watch(attached, "parameters", name)
    for name, buffer in model.named_buffers():
        tracker.watch(buffer, "buffers", name)
    _watch_gradients(model, tracker)


def _watch_gradients(model: torch.nn.Module, tracker: Tracker) -> None:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            tracker.watch(parameter.grad, "gradients", f"gradient of {name}")


def simulate_forward(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    device: torch.device,
    is_traced: bool = True,
    checks: set[str] | None = None,
) -> None:
    """Runs the forward alone, for what it calls; `is_traced` as a compiler traces it, `checks` is as for `simulate`."""
    way = as_compiled() if is_traced else contextlib.nullcontext()
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), kernels_of(device), FiniteValues(checks), way:
        _run_forward(lambda: model(*args, **kwargs))


def _prime(optimizer: torch.optim.Optimizer) -> None:
    """Lets the optimizer make its state, by a step for all parameters at once where it has one."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
    at_once = [group for group in optimizer.param_groups if _may_step_at_once(group)]
    for group in at_once:
        group["foreach"] = True
    _optimizer_step(optimizer)
    for group in at_once:
        group["foreach"] = None
    optimizer.zero_grad(set_to_none=True)


def _may_step_at_once(group: dict[str, Any]) -> bool:
    """True for parameters of which PyTorch may choose how they are stepped; rates that are tensors rule one way out."""
    has_tensors = any(
        isinstance(leaf, torch.Tensor) for name in group if name != "params" for leaf in _leaves(group[name])
    )
    is_chosen = group.get("foreach", True) is not None or group.get("fused") or group.get("differentiable")
    return not (has_tensors or is_chosen)


def _optimizer_step(optimizer: torch.optim.Optimizer) -> None:
    try:
        optimizer.step()
    except Exception as error:
        raise ValueError(
            f"a step of {type(optimizer).__name__} cannot be simulated ({type(error).__name__}: {error}): "
            "pass optimizer='adamw', 'sgd' or 'none', whichever holds as much state"
        ) from error


def _run_forward(run: Callable[[], Any]) -> Any:
    """Runs a forward; ValueError, with the place in the code, where it asks for values that planning does not have."""
    try:
        return run()
    except (DataDependentOutputException, DynamicOutputShapeException, RuntimeError) as error:
        is_ours = isinstance(error, (DataDependentOutputException, DynamicOutputShapeException))
        if not is_ours and NO_NUMPY not in str(error):
            raise
        raise ValueError(
            "planning runs the model without values, and its forward asks for some (a branch on an activation, "
            f".item(), .numpy(), nonzero): {place_in(traceback.extract_tb(error.__traceback__))}. If that is in its "
            "loss (a matching of boxes to labels), plan with example_inputs without labels, and loss_fn"
        ) from error


def _checked_loss(loss: Any) -> torch.Tensor:
    if not isinstance(loss, torch.Tensor):
        raise ValueError(f"the loss must be a tensor, got {type(loss).__name__}: pass a loss_fn that returns one")
    if loss.numel() != 1:
        raise ValueError(f"the loss must be one number, got a tensor of shape {tuple(loss.shape)}: pass loss_fn")
    if not loss.requires_grad:
        raise ValueError("the loss does not depend on any trained parameter: pass a loss_fn that keeps the graph")
    return loss


def _backward(loss: torch.Tensor) -> None:
    """`loss.backward()`, which itself would run with torch function modes switched off: what is recomputed in backward
    would take other kernels than in forward."""
    engine: Any = torch.autograd.Variable._execution_engine
    gradients = (torch.ones_like(loss, memory_format=torch.preserve_format),)
    engine.run_backward((loss,), gradients, False, False, (), allow_unreachable=True, accumulate_grad=True)


def default_loss(output: Any) -> torch.Tensor:
    """The loss of a model's output: its `loss`, or a stand-in that needs one gradient as large as each output."""
    loss = own_loss(output)
    if loss is not None:
        return loss
    tensors = _trained(output)
    if not tensors:
        raise ValueError("the model's output has no loss and no tensor that requires a gradient: pass loss_fn")
    return torch.stack([tensor.square().mean() for tensor in tensors]).sum()


def own_loss(output: Any) -> torch.Tensor | None:
    """The loss that a model returns: its output's `loss`, or the one number that it is."""
    loss = output.get("loss") if hasattr(output, "get") else getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor):
        return loss
    tensors = _trained(output)
    return tensors[0] if len(tensors) == 1 and tensors[0].dim() == 0 else None


def _trained(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in _leaves(output) if leaf.is_floating_point() and leaf.requires_grad]


def _held_by(output: Any) -> list[torch.Tensor]:
    """The tensors that an output holds, also in its key-value caches."""
    leaves = _pytree.tree_leaves(output)
    caches = [leaf for leaf in leaves if hasattr(leaf, "get_seq_length")]
    cached = [tensor for cache in caches for tensor in tensors_inside(cache)]
    return [*(leaf for leaf in leaves if isinstance(leaf, torch.Tensor)), *cached]


def _leaves(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    if hasattr(output, "values"):
        return [leaf for value in output.values() for leaf in _leaves(value)]
    if isinstance(output, (tuple, list)):
        return [leaf for value in output for leaf in _leaves(value)]
    return []
