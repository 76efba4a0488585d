"""An integer program over the actions that an analysis allows: a plan."""

from velora_fx.choose.planner import Planner

__all__ = [
    "Planner",
]
