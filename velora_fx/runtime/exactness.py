"""Whether an optimizer steps a factored gradient as it would the dense one."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from velora_fx.ops import fold
from velora_fx.runtime.optimizers import copy_optimizer

STEPS = 8
TOLERANCE = 1e-9
# A rate that is not zero, on the CPU, whatever device and warmup the real step has.
PLAIN: Mapping[str, Any] = {"lr": 1e-2, "capturable": False, "foreach": False, "fused": False}


def check_exactness(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> None:
    """Raises RuntimeError if a step of a carrier, folded, is not the optimizer's step of the weight itself.

    A few steps of a small weight and of its carrier are compared in float64: they agree for an optimizer that is
    elementwise and treats both signs alike, and that decays weights, if at all, apart from their gradient
    (arXiv 1711.05101). `group` has the settings.
    """
    name = type(optimizer).__name__
    try:
        is_exact = _is_exact(optimizer, group)
    except Exception as error:
        raise RuntimeError(
            f"velora_fx: whether {name} is exact with factored gradients could not be tried "
            f"({type(error).__name__}: {error}): use torch.optim.AdamW, or gradients='dense'"
        ) from error
    if is_exact:
        return
    if group.get("weight_decay") and _is_exact(optimizer, {**group, "weight_decay": 0}):
        raise RuntimeError(
            f"velora_fx: {name} adds weight_decay={group['weight_decay']} to the gradient, which factored gradients "
            "cannot hold: use decoupled weight decay (torch.optim.AdamW, decoupled_weight_decay=True), weight_decay=0 "
            "for these parameters, or gradients='dense'"
        )
    raise RuntimeError(
        f"velora_fx: {name} is not exact with factored gradients: its step of a weight depends on more than the "
        "gradient's own entry, or not alike for both signs. Use an elementwise optimizer such as torch.optim.AdamW, or "
        "gradients='dense'"
    )


def settings_of(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a group's settings exactness may depend on: whether numbers are zero, not what schedules make of them.

    The rate and the kernels are left out: it is tried with PLAIN ones.
    """

    def kind(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(map(kind, value))
        if isinstance(value, (bool, str, type(None))):
            return value
        return bool(value) if isinstance(value, (int, float)) else type(value)

    return tuple((name, kind(value)) for name, value in group.items() if name not in ("params", "initial_lr", *PLAIN))


def kept_share(group: Mapping[str, Any]) -> Any:
    """What decoupled weight decay leaves of a weight in one step: a number, or a tensor where the rate is one."""
    decay = group.get("weight_decay") or 0.0
    return 1.0 - group["lr"] * decay if decay else 1.0


def _is_exact(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    settings = {name: PLAIN.get(name, value) for name, value in group.items() if name != "params"}
    for value in vars(optimizer).values():
        if isinstance(value, (torch.optim.Optimizer, torch.nn.Module)):  # a copy would step it
            raise TypeError(f"it has a {type(value).__name__} of its own")
    try:
        return _agree(
            lambda parameter: copy_optimizer(optimizer, [{**copy.deepcopy(settings), "params": [parameter]}]), settings
        )
    except KeyError:  # its constructor makes the state, as Adagrad's does
        accepted = inspect.signature(type(optimizer)).parameters
        chosen = {name: value for name, value in settings.items() if name in accepted}
        return _agree(lambda parameter: type(optimizer)([parameter], **chosen), settings)


def _agree(optimizer_of: Callable[[torch.nn.Parameter], torch.optim.Optimizer], settings: Mapping[str, Any]) -> bool:
    """Steps a weight, and its carrier which is folded into a copy of it, with the same gradients."""
    generator = torch.Generator().manual_seed(0)
    v = torch.tensor([[1.0, -1.0, -1.0, 1.0], [-1.0, 1.0, -1.0, -1.0]], dtype=torch.float64) / 2
    start = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    dense, weight = torch.nn.Parameter(start.clone()), start.clone()
    carrier = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    both = [optimizer_of(parameter) for parameter in (dense, carrier)]
    keep = torch.tensor(kept_share(settings), dtype=torch.float64)
    for _ in range(STEPS):
        factor = torch.randn(3, 2, generator=generator, dtype=torch.float64)
        dense.grad = (factor.unsqueeze(-1) * v).flatten(1)
        carrier.grad = factor * v[0, 0].abs()
        for one in both:
            one.step()
        with torch.no_grad():
            fold([weight], [carrier], [v], keep)
    change = (dense.detach() - start).norm()
    return bool((dense.detach() - weight).norm() <= TOLERANCE * change) and bool(change > 0)
