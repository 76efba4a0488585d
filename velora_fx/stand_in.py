"""A callable in the place of a module's forward."""

from __future__ import annotations

import inspect
from typing import Any

import torch


class StandIn:
    """Takes the place of `block.forward`, with the signature of the original, and gives it back.

    It is a plain object that holds the block: a deep copy of the model holds the copied block, a pickle the pickled
    one. A bound method would not do: it could not carry a signature, and wrappers rebind methods to the module.
    """

    def __init__(self, block: torch.nn.Module) -> None:
        self.block = block
        self.previous = vars(block).get("forward")
        self.removed = False
        self.__signature__ = inspect.signature(block.forward)

    def install(self) -> None:
        """Makes this the forward of the block."""
        self.removed = False
        setattr(self.block, "forward", self)  # noqa: B010 (a plain attribute that shadows the method)

    def remove(self) -> None:
        """Gives the block its own forward back; a wrapper that still calls this gets that forward too."""
        self.removed = True
        if vars(self.block).get("forward") is self:
            del self.block.forward
            if self.previous is not None:
                self.block.forward = self.previous

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that the block had before."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.block).forward(self.block, *args, **kwargs)


def uninstall(model: torch.nn.Module) -> None:
    """Takes every stand-in out of the model."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, StandIn):
            forward.remove()
