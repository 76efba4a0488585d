"""The timeline of a step of many equal blocks, from that of a step of few."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from velora_fx.capture import UnequalError
from velora_fx.simulate.equal_blocks.block_tracker import ListOperator, ShownStep
from velora_fx.simulate.equal_blocks.renaming import renamed, renaming
from velora_fx.simulate.equal_blocks.repetition import Repetition
from velora_fx.simulate.equal_blocks.shorten import Shortened
from velora_fx.simulate.timeline import Timeline


def lengthen(
    shown: ShownStep, shortened: Shortened, observe: Callable[[Repetition], None] = lambda repetition: None
) -> Timeline:
    """The timeline with all blocks of all stretches; `observe` gets the repetition of each stretch, in order.

    Raises UnequalError where the blocks in the middle of a stretch do not do the same in the same order.
    """
    step = replace(shown, timeline=renamed(shown.timeline, renaming(shortened.stands_for)))
    seconds, first = shown.timeline.seconds, 0
    for stretch in shortened.stretches:
        count = stretch.num_copies
        if count:
            _check_handed(shown.handed, first)
            repetition = Repetition(step, first, stretch)
            observe(repetition)
            step = repetition.repeated
            seconds += _more_seconds(shown, first + 1, count)
        first += len(stretch.shown)
    if any(stretch.num_copies for stretch in shortened.stretches):
        lists = shown.lists
        seconds += sum(_list_seconds(shown, op, shortened) - op.seconds for op in lists)
    return replace(step.timeline, seconds=seconds)


def _check_handed(handed: frozenset[tuple[int, int]], first: int) -> None:
    """Refuses a block in the middle of which others than the next take something in their forward."""
    for giver, taker in handed:
        if giver in (first + 1, first + 2) and taker not in (giver, giver + 1):
            raise UnequalError("what equal blocks make is taken by more than the next of them")


def _more_seconds(shown: ShownStep, block: int, count: int) -> float:
    one, other = shown.seconds.get(block, 0.0), shown.seconds.get(block + 1, 0.0)
    if not np.isclose(one, other, rtol=1e-9):
        raise UnequalError("equal blocks take different times")
    return count * one


def _list_seconds(shown: ShownStep, op: ListOperator, shortened: Shortened) -> float:
    """What an operator on lists takes with the tensors of all blocks."""
    num_bytes, first = op.other_bytes + sum(op.num_bytes), 0
    for stretch in shortened.stretches:
        own = sum(size for size, block in zip(op.num_bytes, op.blocks, strict=True) if block == first + 1)
        num_bytes += stretch.num_copies * own
        first += len(stretch.shown)
    least = shown.device.launch_seconds
    return max(num_bytes / shown.device.bytes_per_second, least) if op.seconds else 0.0
