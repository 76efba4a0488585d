"""Optimizers for copies of a model."""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from velora_fx.passes.swap import CARRIER

OptimizerFactory = Callable[[torch.nn.Module], torch.optim.Optimizer | None]


def optimizer_factory(optimizer: Any, model: torch.nn.Module, device: torch.device) -> OptimizerFactory:
    """Reads the `optimizer` option: "adamw", "sgd", "none", an optimizer class, or an optimizer of the model.

    The optimizer of a copy of the model is made from it; an instance is copied with its parameter groups and
    settings. Raises ValueError for anything else, or for an instance with parameters that are not the model's.
    """
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer  # accelerate's wrapper
    if isinstance(optimizer, torch.optim.Optimizer):
        return _copy_of(optimizer, model)
    if isinstance(optimizer, str) and optimizer == "none":
        return lambda copied: None
    named: dict[str, Any] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    make: Any = named.get(optimizer) if isinstance(optimizer, str) else optimizer
    if not (isinstance(make, type) and issubclass(make, torch.optim.Optimizer)):
        raise ValueError(
            "optimizer must be 'adamw', 'sgd', 'none', a torch.optim.Optimizer class or an optimizer of the model, "
            f"got {optimizer!r}"
        )
    # What PyTorch chooses by itself on a GPU; the fake weights of a plan made without one are CPU tensors.
    takes_foreach = "foreach" in inspect.signature(make).parameters
    options: dict[str, Any] = {"foreach": True} if device.type == "cuda" and takes_foreach else {}

    def construct(copied: torch.nn.Module) -> torch.optim.Optimizer:
        try:
            made: torch.optim.Optimizer = make([p for p in copied.parameters() if p.requires_grad], **options)
        except TypeError as error:
            raise ValueError(f"the optimizer class {make.__name__} takes more arguments: pass an instance") from error
        return made

    return construct


def _copy_of(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> OptimizerFactory:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    unknown = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in names]
    if unknown:
        raise ValueError(
            f"the optimizer holds {len(unknown)} parameters that are not the model's: "
            "make it from model.parameters(), or pass its class"
        )

    def make(copied: torch.nn.Module) -> torch.optim.Optimizer:
        parameters = dict(copied.named_parameters())
        groups = [
            {**group, "params": [p for p in dict.fromkeys(stepped) if p is not None]}
            for group in optimizer.param_groups
            for stepped in [[_stepped(parameters, names[id(p)]) for p in group["params"]]]
        ]
        return copy_optimizer(optimizer, groups)

    return make


def copy_optimizer(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """An optimizer with copies of the settings of another, for other parameter groups and without state.

    It is made without its constructor, whose arguments are not known; a scheduler's wrapper of `step` stays behind.
    """
    # The last two are there while a GradScaler steps it.
    left = ("state", "param_groups", "step", "grad_scale", "found_inf")
    own = {name: value for name, value in vars(optimizer).items() if name not in left and not name.endswith("_hooks")}
    made = type(optimizer).__new__(type(optimizer))
    shared = {id(value): value for value in own.values() if isinstance(value, torch.nn.Module)}  # may be a large model
    vars(made).update(copy.deepcopy(own, shared))
    made.__setstate__({"state": defaultdict(dict), "param_groups": groups})
    return made


def _stepped(parameters: dict[str, torch.nn.Parameter], name: str) -> torch.nn.Parameter | None:
    """What an optimizer of the copy would hold in place of a weight or its carrier: the carrier, if there is one; None
    for a weight that the copy leaves out."""
    weight = name if name in parameters else name.removesuffix(CARRIER)  # the copy may be without carriers
    carrier = parameters.get(weight + CARRIER)
    return parameters.get(weight) if carrier is None else carrier
