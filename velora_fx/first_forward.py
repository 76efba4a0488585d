"""Planning at the first training forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from velora_fx.options import Options
from velora_fx.plans import Plan
from velora_fx.stand_in import StandIn

STATE = "_velora_fx"


@dataclass(frozen=True)
class Request:
    """What `optimize` was asked for: a budget or a plan, and projections to load with it."""

    options: Options
    device: torch.device
    budget_bytes: int | None
    plan: Plan | None
    projections: Mapping[str, torch.Tensor]

    def __deepcopy__(self, memo: dict[int, Any]) -> Request:
        return self  # an optimizer or a trainer in it belongs to nobody's copy


class FirstForward(StandIn):
    """Stands in for a model's forward until the first call in training, plans for it, and steps aside."""

    def __init__(
        self,
        model: torch.nn.Module,
        request: Request,
        apply: Callable[[torch.nn.Module, Request, tuple[Any, ...], dict[str, Any]], None],
    ) -> None:
        super().__init__(model)
        self.request = request
        self.apply = apply
        self.planning = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        waiting = not (self.removed or self.planning)
        if waiting and self.block.training and torch.is_grad_enabled():
            self.plan(args, kwargs)
            own = vars(self.block).get("forward")
            if own is not None and own is not self.previous:
                return own(*args, **kwargs)
        return self.original(*args, **kwargs)

    @torch.compiler.disable(  # type: ignore[no-untyped-call,untyped-decorator]
        reason="velora_fx plans at the first training forward, which cannot be compiled: pass example_inputs to "
        "velora_fx.optimize to use torch.compile(fullgraph=True) at once"
    )
    def plan(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Plans for this call and installs the plan."""
        self.planning = True
        try:
            self.apply(self.block, self.request, args, kwargs)
        finally:
            self.planning = False
