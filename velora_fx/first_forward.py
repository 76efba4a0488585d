"""Planning at the first training forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from velora_fx.options import Options
from velora_fx.plans import Plan
from velora_fx.runtime import STATE, StandIn

Apply = Callable[[torch.nn.Module, "Request", tuple[Any, ...], dict[str, Any]], None]


@dataclass(frozen=True)
class Request:
    """What `optimize` or `apply` was asked for: a budget or a plan, and projections to load with it."""

    options: Options
    device: torch.device
    budget_bytes: int | None
    plan: Plan | None
    projections: Mapping[str, torch.Tensor]

    def __deepcopy__(self, memo: dict[int, Any]) -> Request:
        return self  # an optimizer or a trainer in it belongs to nobody's copy


class FirstForward(StandIn):
    """Plans for a model at its first call in training, and steps aside.

    It hangs before the forward as a hook, which nobody replaces, and stands in for the forward, which some call without
    hooks. Where someone has put another forward there and calls that without hooks (PEFT calls what TRL has put there
    so), a hook on the modules in it notices: it then stands in for that forward, from the next call on.
    """

    def __init__(self, model: torch.nn.Module, request: Request, apply: Apply) -> None:
        super().__init__(model)
        self.request = request
        self.apply = apply
        self.planning = False
        self.planned = False
        self.handles: list[RemovableHandle] = []

    @property
    def stand_ins(self) -> list[StandIn]:
        """What stands in for forwards: itself."""
        return [self]

    def install(self) -> None:
        """Makes this the forward of the model and hangs it before whatever is."""
        super().install()
        self.handles = [self.block.register_forward_pre_hook(self.before, with_kwargs=True)]
        for module in self.block.modules():
            if module is not self.block and any(True for _ in module.parameters(recurse=False)):
                self.handles.append(module.register_forward_pre_hook(self.inside))

    def remove(self) -> None:
        """Gives the model its own forward back and takes the hooks off."""
        super().remove()
        for handle in self.handles:
            handle.remove()
        self.handles = []

    @property
    def is_due(self) -> bool:
        """True if a call now is the first one in training."""
        waiting = not (self.removed or self.planning)
        return waiting and self.block.training and torch.is_grad_enabled()

    def before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook before the model's forward."""
        if self.is_due:
            self.plan(torch.compiler.is_compiling(), args, kwargs)

    def inside(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        """The hook before the modules in the model."""
        if self.is_due and vars(self.block).get("forward") is not self:
            self.stand_in_anew()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_due:
            self.plan(torch.compiler.is_compiling(), args, kwargs)
        if self.planned:  # in this call, which had taken this for the forward before
            self.planned = False
            own = vars(self.block).get("forward")
            if isinstance(own, StandIn):  # what was put around this has called it: it is not to be run in itself
                return own(*args, **kwargs)
        return self.original(*args, **kwargs)

    @torch.compiler.disable(  # type: ignore[no-untyped-call,untyped-decorator]
        reason="velora_fx plans at the first training forward, which cannot be compiled: pass example_inputs to "
        "velora_fx.optimize to use torch.compile(fullgraph=True) at once"
    )
    def plan(self, is_compiled: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Plans for this call, as one of compiled code or not where it was not said, and installs the plan."""
        options = self.request.options
        if options.compiled is None and is_compiled:
            options = replace(options, compiled=True)
        self.planning = True
        try:
            self.apply(self.block, replace(self.request, options=options), args, kwargs)
            self.planned = True
        finally:
            self.planning = False

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def stand_in_anew(self) -> None:
        """Has another one take the place of the forward that was put into its own."""
        self.remove()
        wait(self.block, self.request, self.apply)


def wait(model: torch.nn.Module, request: Request, apply: Apply) -> None:
    """Has `apply` plan for a model at its first training forward."""
    first = FirstForward(model, request, apply)
    first.install()
    setattr(model, STATE, first)
