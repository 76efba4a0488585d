"""What calls of torch.utils.checkpoint wrap, run once and in place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch.utils.checkpoint

from velora_fx.limits import replaced

ContextFn = Callable[[], Any]


@contextlib.contextmanager
def inlined_checkpoints(after: Callable[[], None] = lambda: None) -> Iterator[list[ContextFn | None]]:
    """Has `torch.utils.checkpoint.checkpoint` call what it is given, and then `after`.

    The list that it yields holds the `context_fn` of each checkpoint that is open, None for the default one.
    """
    opened: list[ContextFn | None] = []
    module = torch.utils.checkpoint

    def generator(function: Any, preserve_rng_state: bool, context_fn: ContextFn, *args: Any, **kwargs: Any) -> Any:
        with _open(opened, None if context_fn is module.noop_context_fn else context_fn):
            yield
            after()

    class Reentrant:
        @staticmethod
        def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
            with _open(opened, None):
                result = function(*args)
                after()
                return result

    with (
        replaced(module, "_checkpoint_without_reentrant_generator", generator),
        replaced(module, "CheckpointFunction", Reentrant),
    ):
        yield opened


@contextlib.contextmanager
def _open(opened: list[ContextFn | None], context_fn: ContextFn | None) -> Iterator[None]:
    opened.append(context_fn)
    try:
        yield
    finally:
        opened.pop()
