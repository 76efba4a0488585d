"""What is said about a model in training: each thing once, whichever of its blocks it is true of."""

from __future__ import annotations

import re
import warnings
from typing import Any, Protocol, runtime_checkable

import torch

from velora_fx.capture import in_checkpoint
from velora_fx.devices import autocast_of
from velora_fx.plans import Plan
from velora_fx.runtime.stand_in import StandIn


@runtime_checkable
class Named(Protocol):
    """What is spoken of: a region, or a block that is recomputed."""

    name: str


class Notices:
    """The warnings of the regions of one model; `plan` is theirs, None if anything will do.

    A copy of the model has its own, which begin with what was said before.
    """

    def __init__(self, plan: Plan | None) -> None:
        self.compiled = None if plan is None else plan.compiled
        self.device, self.autocast = ("", None) if plan is None else (plan.device, plan.autocast)
        compressed, recomputed = ((), ()) if plan is None else (plan.compressed, plan.recomputed)
        self.num_regions = len({item.region for item in compressed} | {item.region for item in recomputed})
        self.frees_in_checkpoints = plan is None or plan.is_factored or plan.objective == "speed"
        self.said: set[str] = set()
        self.eager_calls: dict[str, int] = {}

    def say(self, region: str, text: str, example: str = "") -> None:
        """Warns of something that is true of a region, unless the same was said of another one, or with another
        example."""
        if text not in self.said:
            self.said.add(text)
            warnings.warn(
                f"velora_fx: {region or 'the model'} {text}{example} (said once, whatever other blocks it is true of)",
                stacklevel=4,
            )

    def check_target(self, region: Named) -> None:
        """Warns of a region that runs otherwise than it was planned for, but for a first step before it is compiled."""
        if torch.compiler.is_compiling():
            if self.compiled is not None:
                from torch._dynamo.comptime import comptime

                comptime(_say_compiled)
            return
        if self.device and autocast_of(self.device) != self.autocast:
            now, then = (f"autocast {dtype or 'off'}" for dtype in (autocast_of(self.device), self.autocast))
            self.say(region.name, f"runs with {now}, and was planned with {then}: plan within the autocast of training")
        self.check_checkpoints(region)
        if self.compiled:
            calls = self.eager_calls[region.name] = self.eager_calls.get(region.name, 0) + 1
            if calls == ENOUGH_EAGER_CALLS:
                self.say(region.name, EAGER)

    def check_compiled(self, region: Named, compiled: object) -> None:
        """Warns of a region that is compiled otherwise than it was planned for: as a part of what `compiled` is, if
        that is a module."""
        if self.compiled is False:
            self.say(region.name, COMPILED)
        elif isinstance(compiled, torch.nn.Module):
            names = _names_in(compiled)
            has_several_blocks = len({NUMBER.sub("", name) for name in names}) < len(names)
            if self.compiled == "blocks" and has_several_blocks:
                self.say(region.name, AS_ONE)
            elif self.compiled is True and len(names) < self.num_regions:
                self.say(region.name, APART)

    def check_checkpoints(self, region: Named, is_told: bool = False) -> None:
        """Warns of a region or a recomputed block that is checkpointed, by its caller or as it `is_told` to, though it
        was not planned for so."""
        if not self.frees_in_checkpoints and (is_told or in_checkpoint()):
            self.say(region.name, TWICE)


ENOUGH_EAGER_CALLS = 4  # two steps of a block that is called once more by a checkpoint
EAGER = (
    "runs eagerly, which keeps other tensors than the compiled step that was planned for: compile the model with "
    "torch.compile, or plan with compiled=False"
)
TWICE = (
    "is under gradient checkpointing already, where the plan for it frees nothing more: leave that off, or turn it on "
    "before velora_fx.optimize"
)
NUMBER = re.compile(r"\d+")
AS_ONE = (
    "is compiled in one graph with others, which keeps other tensors than the blocks that were planned for, each "
    "compiled by itself: plan with compiled=True, or compile block by block"
)
APART = (
    "is compiled by itself, which keeps other tensors than the one graph that was planned for: plan with "
    "compiled='blocks', or use torch.compile(model)"
)
COMPILED = (
    "runs under torch.compile, where other tensors are kept than in the eager step that was planned for: plan with "
    "velora_fx.optimize(..., compiled=True)"
)


def _say_compiled(context: Any) -> None:
    """Runs while Dynamo traces `check_target`, with its locals: an ordinary warning would not be seen there.

    The name is that of the real region, on which no compiled code depends: equal blocks share theirs. What is compiled
    is the `self` of the outermost frame.
    """
    region = context.get_local("region")._i_will_not_complain_if_bc_breaks_VariableTracker().value
    outermost = context._i_will_not_complain_if_bc_breaks_InstructionTranslator().output.root_tx
    owner = outermost.f_locals.get("self")
    region.notices.check_compiled(region, owner.block if isinstance(owner, StandIn) else owner)


def _names_in(module: torch.nn.Module) -> set[str]:
    """The names of what stands in for the forwards of modules in it."""
    forwards = [vars(inner).get("forward") for inner in module.modules()]
    return {forward.name for forward in forwards if isinstance(forward, StandIn) and isinstance(forward, Named)}
