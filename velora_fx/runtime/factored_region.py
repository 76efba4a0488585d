"""A region whose weights have factored gradients, which its graph alone gives."""

from __future__ import annotations

from typing import Any

import torch

from velora_fx.capture import Call, Seen, carriers_of
from velora_fx.passes.swap import CARRIER, Carrier
from velora_fx.runtime.factored_step import Folding
from velora_fx.runtime.inner_hooks import inside_torch_func
from velora_fx.runtime.region import Region


class FactoredRegion(Region):
    """The forward of a block whose compressed weights are trained by their carriers.

    Their gradient comes from the graph alone: it runs in `eval()` too, and inside of the checkpoint under gradient
    checkpointing; where no graph can run, the call raises RuntimeError.
    """

    def __init__(self, *args: Any, listener: Folding) -> None:
        super().__init__(*args)
        self.carriers = tuple(dict.fromkeys(carrier.name for carrier in self.directions))
        self.listener = listener

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's weights are stepped as the original's are."""
        vars(self).update(state)
        if not self.removed:
            self.listener.add(self)

    def install(self) -> None:
        """Makes this the forward of the block, whose carriers are in place."""
        super().install()
        self.listener.add(self)

    def remove(self) -> None:
        """Gives the block its own forward back."""
        super().remove()
        self.listener.discard(self)

    def is_exempt(self) -> bool:
        """False: the original forward would leave the weights untrained."""
        return False

    def prepare(self) -> None:
        """Freezes the weights again: `requires_grad_(True)` on the model or PEFT may have undone it."""
        if torch.compiler.is_compiling() or inside_torch_func():
            return
        for name in self.carriers:
            self.block.get_parameter(name.removesuffix(CARRIER)).requires_grad_(False)

    def fall_back(self, reason: str | None, key: tuple[Any, ...] | None = None) -> None:
        """Raises RuntimeError, with what is new about a call that no graph stands for."""
        if torch.compiler.is_compiling():
            super().fall_back(reason, key)
        elif key is not None:
            reason = f"{reason} ({self.what_differs(key)})"
        self.refuse(reason)

    def refuse(self, reason: str | None) -> None:
        """Raises RuntimeError."""
        raise RuntimeError(
            f"velora_fx: {self.name or 'the model'} has factored gradients, which its graph alone gives, and none "
            f"can run: {reason}. Plan with example_inputs like this call, or with gradients='dense'"
        )

    def extra(self, call: Call, seen: Seen | None) -> list[torch.Tensor]:
        """What a graph is given after the call's tensors: the live carriers, and the projections."""
        carriers = carriers_of(self.block) if seen is None else seen.carriers
        missing = [name for name in self.carriers if name not in carriers]
        if missing:
            self.refuse(f"{missing[0]} is gone: restore the model, change it, and optimize it again")
        return [*(carriers[name] for name in self.carriers), *super().extra(call, seen)]

    @property
    def directions(self) -> dict[Carrier, torch.Tensor]:
        """The projection v [G, M] of each carrier's weight, on the CPU."""
        choices = self.choices.values()
        return {choice.carrier: self.projections[choice.tensor] for choice in choices if choice.carrier}
