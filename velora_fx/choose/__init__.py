"""An integer program over the actions that an analysis allows: a plan."""

from velora_fx.choose.planner import Planner, actions_of

__all__ = [
    "Planner",
    "actions_of",
]
