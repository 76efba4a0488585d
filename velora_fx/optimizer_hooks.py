"""Hooks on all optimizers."""

from __future__ import annotations

from torch.utils.hooks import RemovableHandle


def leave(handle: RemovableHandle | None) -> None:
    """Takes a hook off the optimizers from inside of a call of it, once it is the last.

    PyTorch goes through the hooks themselves, not through a copy.
    """
    hooks = handle.hooks_dict_ref() if handle is not None else None
    if handle is not None and hooks is not None and next(reversed(hooks), None) == handle.id:
        handle.remove()
