"""What is around or inside of a block that a graph would pass over: hooks, and transforms of functions."""

from __future__ import annotations

from typing import Any

import torch

from velora_fx.capture import Seen


def why_no_graph(block: torch.nn.Module, seen: Seen | None) -> str | None:
    """Why no graph can stand for a call now, or None. `seen` is the block, if it was looked at."""
    if inside_torch_func():
        return "it is called inside of torch.func"
    has_none = seen is not None and not seen.has_hooks and not torch.nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
    return None if has_none else hooks_in(block)


def hooks_in(block: torch.nn.Module) -> str | None:
    """Which hooks a graph of the block would not call; None if there are none. Those on the block itself run."""
    for name, module in block.named_modules():
        others = (module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if module is not block and (any(others) or not all(map(is_idle, module._forward_hooks.values()))):
            return f"{name} in it has hooks, which a graph would not call"
    if not torch.compiler.is_compiling() and torch.nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return "there are hooks on all modules, which a graph would not call"
    return None


def is_idle(hook: Any) -> bool:
    """True for a hook that transformers leaves on inner modules for good, while the outputs that it collects are not
    asked for."""
    if getattr(hook, "__module__", None) != "transformers.utils.output_capturing":
        return False
    active = hook.__globals__["_active_collector"]
    if torch.compiler.is_compiling() and not active.compiling:
        return False  # it is a ContextVar, which Dynamo cannot read
    collected = active.get()
    return collected is None or hook.__closure__[hook.__code__.co_freevars.index("key")].cell_contents not in collected


def inside_torch_func() -> bool:
    """True while `torch.func` transforms what runs."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
