"""Planning at the first training forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from velora_fx.options import Options
from velora_fx.plans import Plan


@dataclass(frozen=True)
class Request:
    """What `optimize` was asked for: a budget or a plan, and projections to load with it."""

    options: Options
    device: torch.device
    budget_bytes: int | None
    plan: Plan | None
    projections: Mapping[str, torch.Tensor]


class FirstForward:
    """Stands in for a model's forward until the first call in training, plans for it, and steps aside."""

    def __init__(
        self,
        model: torch.nn.Module,
        request: Request,
        apply: Callable[[torch.nn.Module, Request, tuple[Any, ...], dict[str, Any]], None],
    ) -> None:
        self.model = model
        self.request = request
        self.apply = apply
        self.previous = vars(model).get("forward")
        self.planned = False
        self.__signature__ = inspect.signature(model.forward)

    def install(self) -> None:
        """Makes this the forward of the model."""
        self.model.forward = self

    def remove(self) -> None:
        """Gives the model its own forward back."""
        if vars(self.model).get("forward") is self:
            del self.model.forward
            if self.previous is not None:
                self.model.forward = self.previous

    @torch.compiler.disable(
        reason="velora_fx plans at the first training forward, which cannot be compiled: pass example_inputs to "
        "velora_fx.optimize to use torch.compile(fullgraph=True) at once"
    )
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.planned and self.model.training and torch.is_grad_enabled():
            self.apply(self.model, self.request, args, kwargs)
            self.planned = True
            self.remove()
            own = vars(self.model).get("forward")
            if own is not None and own is not self.previous:
                return own(*args, **kwargs)
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.model).forward(self.model, *args, **kwargs)
