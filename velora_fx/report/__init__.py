"""A plan as text and as a picture."""

from velora_fx.report.measured import mismatch_text
from velora_fx.report.plot import figure_class, plot
from velora_fx.report.text import inputs_text, render, step_name, time_ratio

__all__ = ["figure_class", "inputs_text", "mismatch_text", "plot", "render", "step_name", "time_ratio"]
