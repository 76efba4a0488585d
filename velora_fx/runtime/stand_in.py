"""A callable in the place of a module's forward."""

from __future__ import annotations

import inspect
from typing import Any

import torch

STATE = "_velora_fx"  # the attribute of a model that holds what `optimize` left on it, with its `stand_ins`


class StandIn:
    """Takes the place of `block.forward`, with the signature of the original, and gives it back.

    It is a plain object that holds the block: a deep copy of the model holds the copied block, a pickle the pickled
    one. A bound method would not do: it could not carry a signature, and wrappers rebind methods to the module.
    """

    def __init__(self, block: torch.nn.Module) -> None:
        self.block = block
        self.previous = vars(block).get("forward")
        self.removed = False
        self.is_covered = False
        self.__signature__ = inspect.signature(block.forward)

    def install(self) -> None:
        """Makes this the forward of the block, but for where a wrapper has taken its place and calls it."""
        self.removed = False
        if not self.is_covered:
            setattr(self.block, "forward", self)  # noqa: B010 (a plain attribute that shadows the method)

    def remove(self) -> None:
        """Gives the block its own forward back; a wrapper that still calls this gets that forward too."""
        if self.removed:
            return
        self.removed = True
        self.is_covered = vars(self.block).get("forward") is not self
        if not self.is_covered:
            del self.block.forward
            if self.previous is not None:
                self.block.forward = self.previous

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that the block had before."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.block).forward(self.block, *args, **kwargs)


def uninstall(model: torch.nn.Module) -> list[StandIn]:
    """Takes every stand-in out of the model, also those that are covered by a wrapper, and returns them."""
    taken: list[StandIn] = []
    for module in model.modules():
        state, forward = vars(module).get(STATE), vars(module).get("forward")
        taken += state.stand_ins if state is not None else []
        taken += [forward] if isinstance(forward, StandIn) else []
    for stand_in in taken:
        stand_in.remove()
    return taken
