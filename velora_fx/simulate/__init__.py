"""One training step without memory: a timeline of every storage."""

from velora_fx.simulate.fake import as_compiled, fake_copy, fake_mode, fake_tensor
from velora_fx.simulate.finite_values import FiniteValues
from velora_fx.simulate.kernels import kernels_of
from velora_fx.simulate.roofline import StepTimer
from velora_fx.simulate.saved_tensors import SavedTensors, Saving
from velora_fx.simulate.step import default_loss, make_tracker, simulate, simulate_forward
from velora_fx.simulate.timeline import Timeline
from velora_fx.simulate.tracker import Tracker

__all__ = [
    "FiniteValues",
    "SavedTensors",
    "Saving",
    "StepTimer",
    "Timeline",
    "Tracker",
    "as_compiled",
    "default_loss",
    "fake_copy",
    "fake_mode",
    "fake_tensor",
    "kernels_of",
    "make_tracker",
    "simulate",
    "simulate_forward",
]
