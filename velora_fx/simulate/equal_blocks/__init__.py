"""Of many equal blocks few are simulated, and what the others do follows as numbers."""

from velora_fx.simulate.equal_blocks.block_tracker import BlockTracker, ShownStep, make_block_tracker
from velora_fx.simulate.equal_blocks.lengthen import lengthen
from velora_fx.simulate.equal_blocks.renaming import renaming
from velora_fx.simulate.equal_blocks.repetition import Repetition
from velora_fx.simulate.equal_blocks.rows import find_rows
from velora_fx.simulate.equal_blocks.shorten import WHOLE, Shortened, note_all, shorten, stand_ins

__all__ = [
    "WHOLE",
    "BlockTracker",
    "Repetition",
    "Shortened",
    "ShownStep",
    "find_rows",
    "lengthen",
    "make_block_tracker",
    "note_all",
    "renaming",
    "shorten",
    "stand_ins",
]
