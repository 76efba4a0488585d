"""One training step without memory: a timeline of every storage."""

from velora_fx.simulate.block_tracker import BlockTracker, ShownStep
from velora_fx.simulate.equal_blocks import find_rows
from velora_fx.simulate.fake import as_compiled, fake_copy, fake_mode, fake_tensor, kernels_of
from velora_fx.simulate.finite import FiniteValues
from velora_fx.simulate.lengthen import lengthen
from velora_fx.simulate.renaming import renaming
from velora_fx.simulate.repetition import Repetition
from velora_fx.simulate.roofline import StepTimer
from velora_fx.simulate.saved_tensors import SavedTensors, Saving
from velora_fx.simulate.shortened import WHOLE, Shortened, Stretch, note_all, shorten, stand_ins
from velora_fx.simulate.step import default_loss, make_block_tracker, make_tracker, simulate, simulate_forward
from velora_fx.simulate.timeline import Timeline
from velora_fx.simulate.tracker import Tracker

__all__ = [
    "WHOLE",
    "BlockTracker",
    "FiniteValues",
    "Repetition",
    "SavedTensors",
    "Saving",
    "Shortened",
    "ShownStep",
    "StepTimer",
    "Stretch",
    "Timeline",
    "Tracker",
    "as_compiled",
    "default_loss",
    "fake_copy",
    "fake_mode",
    "fake_tensor",
    "find_rows",
    "kernels_of",
    "lengthen",
    "make_block_tracker",
    "make_tracker",
    "note_all",
    "renaming",
    "shorten",
    "simulate",
    "simulate_forward",
    "stand_ins",
]
