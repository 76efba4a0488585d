"""Fit transformer training into a memory budget by compressing what only the weight gradients need."""

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
