"""A step: what can be compressed or recomputed, and why the rest cannot."""

from velora_fx.analyse.actions import Actions, Sizes
from velora_fx.analyse.analyse import Analysis, analyse
from velora_fx.analyse.candidates import Candidate, weight_names
from velora_fx.analyse.distributed_models import check_unwrapped
from velora_fx.analyse.plan_checks import autocast_in, check_plan_fits, differences_of
from velora_fx.analyse.recomputable import Block
from velora_fx.analyse.region_plans import region_plans
from velora_fx.analyse.trial import Findings, captured, with_traced_graphs

__all__ = [
    "Actions",
    "Analysis",
    "Block",
    "Candidate",
    "Findings",
    "Sizes",
    "analyse",
    "autocast_in",
    "captured",
    "check_plan_fits",
    "check_unwrapped",
    "differences_of",
    "region_plans",
    "weight_names",
    "with_traced_graphs",
]
