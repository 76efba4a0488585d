"""Fit transformer training into a memory budget by compressing what only the weight gradients need."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from velora_fx.api import apply, load_state_dict, measure, optimize, plan, plan_of, restore, state_dict
    from velora_fx.plans import BudgetError, Plan

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "Plan",
    "__version__",
    "apply",
    "load_state_dict",
    "measure",
    "optimize",
    "plan",
    "plan_of",
    "restore",
    "state_dict",
]


def __getattr__(name: str) -> Any:
    """A public name, imported at its first use: the compiler and the solver behind it take seconds.

    AttributeError for another name.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module("velora_fx.plans" if name in ("BudgetError", "Plan") else "velora_fx.api"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
