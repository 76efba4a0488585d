"""A step: what can be compressed or recomputed, and why the rest cannot."""

from velora_fx.analyse.analyse import Actions, Analysis, Sizes, analyse
from velora_fx.analyse.candidates import LARGEST_SUB_TOKEN, Candidate, common_width, weight_names
from velora_fx.analyse.probe import Findings
from velora_fx.analyse.recomputable import Block
from velora_fx.analyse.wrapped import check_unwrapped

__all__ = [
    "LARGEST_SUB_TOKEN",
    "Actions",
    "Analysis",
    "Block",
    "Candidate",
    "Findings",
    "Sizes",
    "analyse",
    "check_unwrapped",
    "common_width",
    "weight_names",
]
