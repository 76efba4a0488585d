"""Fit transformer training into a memory budget by compressing the activations that only weight gradients need."""

from velora_fx.api import load_state_dict, optimize, plan, plan_of, restore, state_dict
from velora_fx.plans import BudgetError, Plan

__all__ = ["BudgetError", "Plan", "load_state_dict", "optimize", "plan", "plan_of", "restore", "state_dict"]
