"""Calls of torch.utils.checkpoint: what they are, noted or run once and in place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode

from velora_fx.capture.refusals import CaptureError, replaced

ContextFn = Callable[[], Any]


@dataclass(frozen=True)
class Checkpoint:
    """How `torch.utils.checkpoint.checkpoint` was called; `context_fn` is None for the default one."""

    use_reentrant: bool
    preserve_rng_state: bool
    context_fn: ContextFn | None = None

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls it in the same way for a function."""
        options: dict[str, Any] = {} if self.context_fn is None else {"context_fn": self.context_fn}
        return torch.utils.checkpoint.checkpoint(
            function, *args, use_reentrant=self.use_reentrant, preserve_rng_state=self.preserve_rng_state, **options
        )


def in_checkpoint() -> bool:
    """True in an eager forward that `torch.utils.checkpoint` runs, and where it runs again in backward."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    is_kept_for = hooks is not None and hooks[0].__qualname__.startswith("_checkpoint_hook.")
    return is_kept_for or torch._C._current_graph_task_id() != -1


@contextlib.contextmanager
def noted_checkpoints(opened: list[Checkpoint]) -> Iterator[None]:
    """Keeps in the list the checkpoints whose forward runs."""
    module = torch.utils.checkpoint
    with _instead(opened, module._checkpoint_without_reentrant_generator, module.CheckpointFunction.apply):
        yield


@contextlib.contextmanager
def inlined_checkpoints(after: Callable[[], None] = lambda: None) -> Iterator[list[Checkpoint]]:
    """Has `torch.utils.checkpoint.checkpoint` call what it is given, and then `after`.

    The list that it yields holds the checkpoints that are open.
    """
    opened: list[Checkpoint] = []

    def generator(*args: Any, **kwargs: Any) -> Any:
        yield
        after()

    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        result = function(*args)
        after()
        return result

    with _instead(opened, generator, apply):
        yield opened


@contextlib.contextmanager
def _instead(
    opened: list[Checkpoint], generate: Callable[..., Any], apply_reentrant: Callable[..., Any]
) -> Iterator[None]:
    """Puts two functions in the place of PyTorch's: the generator around what a checkpoint calls, and the `apply` of a
    reentrant one. Meanwhile the list holds the checkpoints that are open."""

    def generator(function: Any, preserve_rng_state: bool, context_fn: ContextFn, *args: Any, **kwargs: Any) -> Any:
        given = None if context_fn is torch.utils.checkpoint.noop_context_fn else context_fn
        with _open(opened, Checkpoint(False, preserve_rng_state, given)):
            yield from generate(function, preserve_rng_state, context_fn, *args, **kwargs)

    class Reentrant:
        @staticmethod
        def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
            with _open(opened, Checkpoint(True, preserve_rng_state)):
                return apply_reentrant(function, preserve_rng_state, *args)

    with (
        replaced(torch.utils.checkpoint, "_checkpoint_without_reentrant_generator", generator),
        replaced(torch.utils.checkpoint, "CheckpointFunction", Reentrant),
    ):
        yield


@contextlib.contextmanager
def whole_checkpoint() -> Iterator[list[Checkpoint]]:
    """Runs in place the one checkpoint that all of a forward may be in, and puts it into the list that it yields.

    CaptureError where something is computed outside of it.
    """
    found: list[Checkpoint] = []
    outside: list[Any] = []
    with inlined_checkpoints(lambda: found.append(opened[-1])) as opened, _Outside(opened, outside):
        yield found
    if found and (outside or len(found) > 1):
        raise CaptureError("its forward recomputes a part of what it does (checkpointing)")


class _Outside(TorchFunctionMode):
    """Notes what makes tensors while no checkpoint is open."""

    def __init__(self, opened: list[Checkpoint], outside: list[Any]) -> None:
        super().__init__()
        self.opened, self.outside = opened, outside

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.opened and isinstance(result, torch.Tensor):
            self.outside.append(func)
        return result


@contextlib.contextmanager
def _open(opened: list[Checkpoint], checkpoint: Checkpoint) -> Iterator[None]:
    opened.append(checkpoint)
    try:
        yield
    finally:
        opened.pop()
