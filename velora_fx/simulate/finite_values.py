"""The answer to "is everything finite?" where tensors hold no values: planning takes it that they are."""

from __future__ import annotations

import operator
import traceback
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

# By the names of functions: what a check says of every finite number, what keeps that answer, what makes it another.
CHECKS = {"isfinite": True, "isinf": False, "isnan": False, "isposinf": False, "isneginf": False}
SAME, DIFFERENT = ("eq", "__eq__"), ("ne", "__ne__")  # a tensor and itself: a check for numbers that are none
STARTING = frozenset((*CHECKS, *SAME, *DIFFERENT))
KEEPING = ("any", "all", "amax", "amin", "max", "min", "clone", "detach", "flatten", "view", "reshape")
OPERATORS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("logical_not", "bitwise_not", "__invert__"), operator.not_),
    **dict.fromkeys(("logical_or", "bitwise_or", "__or__"), operator.or_),
    **dict.fromkeys(("logical_and", "bitwise_and", "__and__"), operator.and_),
    **{name: getattr(operator, name) for name in ("gt", "ge", "lt", "le", "eq", "ne", "__eq__", "__ne__")},
}
ASKING: dict[str, Callable[..., Any]] = {
    **{"__bool__": bool, "__int__": int, "__float__": float, "item": lambda value: value},
    "_assert": torch._assert,
}


class FiniteValues(TorchFunctionMode):
    """Answers a forward that asks of tensors without values whether all of them are finite: they are.

    The operators of such a check run as they are, for the memory that they take; only the answer, which no value could
    give, is known. `places` gets those in the code that asked. What `torch.export` captures is not answered: its graph
    would take the answer for every call.
    """

    def __init__(self, places: set[str] | None = None) -> None:
        super().__init__()
        self._known: MutableMapping[torch.Tensor, Any] = WeakTensorKeyDictionary()
        self.places = set() if places is None else places

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if not self._known and name not in STARTING:  # nearly always
            return func(*args, **(kwargs or {}))
        if name in ASKING and args[0] in self._known and not torch.compiler.is_exporting():
            self.places.add(place_in(traceback.extract_stack()))
            return ASKING[name](self._known[args[0]], *args[1:])
        answer = self._answer(name, args)
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            if answer is not None:
                self._known[result] = answer
            elif result in self._known:  # it was written to
                del self._known[result]
        return result

    def _answer(self, name: str, args: tuple[Any, ...]) -> Any:
        """What each element of the result is; None where it is not known."""
        if not (args and isinstance(args[0], (FakeTensor, FunctionalTensor))):
            return None
        if name in CHECKS:
            return CHECKS[name]
        if name in (*SAME, *DIFFERENT) and args[0] is args[1]:
            return OPERATORS[name](0, 0)
        values = [self._known.get(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
        if values[0] is None:
            return None
        if name in KEEPING or (name in ("sum", "count_nonzero") and not values[0]):
            return values[0]
        return OPERATORS[name](*values) if name in OPERATORS and None not in values else None


def place_in(frames: traceback.StackSummary) -> str:
    """The innermost place in code that is neither PyTorch's nor ours."""
    own = str(Path(__file__).parents[1])
    found = [f for f in frames if "/torch/" not in f.filename and not f.filename.startswith(own)]
    return f"{found[-1].filename}:{found[-1].lineno}: {found[-1].line}"
