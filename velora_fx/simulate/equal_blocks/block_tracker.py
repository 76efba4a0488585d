"""A tracker that tells which of a few blocks each event of a step belongs to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from velora_fx.devices import ALLOCATOR_BLOCK_BYTES, Device
from velora_fx.simulate.module_scopes import Scopes
from velora_fx.simulate.observer import bytes_behind, tensors_among
from velora_fx.simulate.roofline import StepTimer
from velora_fx.simulate.timeline import Timeline
from velora_fx.simulate.tracker import Tracker

NO_BLOCK = -1


@dataclass(frozen=True)
class ListOperator:
    """An operator on lists of tensors, as an optimizer's: the block and the bytes of what each number of the lists
    holds, the bytes of its other tensors, and the seconds it took."""

    blocks: tuple[int, ...]
    num_bytes: tuple[int, ...]
    other_bytes: int
    seconds: float


@dataclass(frozen=True)
class ShownStep:
    """A step of a model of which few blocks are shown: its timeline, and what a `BlockTracker` notes beside it."""

    timeline: Timeline
    owners: tuple[int, ...]
    seconds: Mapping[int, float]
    lists: tuple[ListOperator, ...]
    handed: frozenset[tuple[int, int]]
    device: Device


class BlockTracker(Tracker):  # type: ignore[no-untyped-call]
    """Also notes, for blocks by their numbers in `blocks`, where each event belongs.

    `owners` has the block of each event, `seconds` what the operators of each block take, `lists` those operators that
    are on tensors of several, and `handed` the pairs of blocks of which the second takes something in its forward that
    the first has made. Outside of all blocks is NO_BLOCK.
    """

    def __init__(self, rounding_bytes: int, scopes: Scopes, blocks: Sequence[str], timer: StepTimer) -> None:
        super().__init__(rounding_bytes, scopes)
        self.numbers = {name: number for number, name in enumerate(blocks)}
        self.timer = timer
        self.owners: list[int] = []
        self.seconds: dict[int, float] = defaultdict(float)
        self.lists: list[ListOperator] = []
        self.handed: set[tuple[int, int]] = set()
        self._running = NO_BLOCK
        self._timed = 0.0
        self._made_in: dict[int, int] = {}  # of storages, the block
        self._found: dict[str, int] = {}
        self._born: dict[int, int] = {}
        self._in_lists: set[int] = set()  # storages that are let go in the order in which they were made

    def step(self, timeline: Timeline) -> ShownStep:
        """What was noted of a step with this timeline."""
        return ShownStep(
            timeline,
            tuple(self.owners),
            dict(self.seconds),
            tuple(self.lists),
            frozenset(self.handed),
            self.timer.device,
        )

    def block_of(self, name: str) -> int:
        """The number of the block that a module or a parameter of this name belongs to."""
        if name not in self._found:
            parts = name.split(".")
            starts = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
            self._found[name] = next((self.numbers[start] for start in starts if start in self.numbers), NO_BLOCK)
        return self._found[name]

    def watch(self, tensor: torch.Tensor, category: str | None = None, label: str | None = None) -> int:
        """As `Tracker.watch`; what is there before the step belongs to the block that its label names."""
        number = super().watch(tensor, category, label)
        if label is not None and not self.moment:
            block = self.block_of(label.rpartition(" of ")[2])
            self.owners[self._born[number]] = self._made_in[number] = block
        return number

    def _note(self, number: int, delta: int) -> None:
        if number not in self._born:
            self._born[number], self._made_in[number] = self.now, self._running
            self.owners.append(self._running)
        else:
            self.owners.append(self._made_in[number] if number in self._in_lists else NO_BLOCK)
        super()._note(number, delta)

    def _block_of_tensor(self, tensor: Any) -> int:
        if not isinstance(tensor, torch.Tensor):
            return NO_BLOCK
        number, _ = self._live.get(id(tensor.untyped_storage()), (-1, None))
        return self._made_in.get(number, NO_BLOCK)

    def _is_given(self, tensor: torch.Tensor) -> bool:
        """True for what is there before the step, where it is taken outside of all blocks: one graph around them takes
        all parameters at once."""
        number, _ = self._live.get(id(tensor.untyped_storage()), (-1, None))
        return self._running == NO_BLOCK and self._born.get(number, self.now) < self.marks[0][0]

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Counts the storages of what an operator of a block returned."""
        if self.moment == "optimizer step":
            first = args[0] if args else None
            if isinstance(first, (list, tuple)):
                self._observe_lists(func, args, kwargs, result)
                return
            self._running = self._block_of_tensor(first)
        else:
            assert self.scopes is not None
            self._running = self.block_of(self.scopes.current().name)
            if self.moment == "forward":
                taken = (*tensors_among(args), *tensors_among(kwargs))
                self.handed |= {(self._block_of_tensor(t), self._running) for t in taken if not self._is_given(t)}
        super().observe(func, args, kwargs, result)
        self.seconds[self._running] += self._seconds_taken()
        self._running = NO_BLOCK

    def _seconds_taken(self) -> float:
        """Since the operator before: with compiled kernels, which are no operators."""
        taken, self._timed = self.timer.seconds - self._timed, self.timer.seconds
        return taken

    def _observe_lists(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        blocks = [self._block_of_tensor(tensor) for tensor in args[0]]
        made = result if isinstance(result, (list, tuple)) else ()
        for number, tensor in enumerate(made):
            self._running = blocks[number]
            self._in_lists.add(self._count(tensor, func, args))
        self._running = NO_BLOCK
        lists = [part for part in (*args, *kwargs.values(), made) if isinstance(part, (list, tuple))]
        num_bytes = [
            sum(bytes_behind(part[n]) for part in lists if n < len(part) and isinstance(part[n], torch.Tensor))
            for n in range(len(blocks))
        ]
        others = sum(bytes_behind(arg) for arg in args if isinstance(arg, torch.Tensor))
        self.lists.append(ListOperator(tuple(blocks), tuple(num_bytes), others, self._seconds_taken()))


def make_block_tracker(
    model: torch.nn.Module,
    device: torch.device,
    blocks: Sequence[str],
    timer: StepTimer,
    rounding_bytes: int | None = None,
) -> BlockTracker:
    """The tracker of a step of this model on a device that tells events of these blocks apart; `rounding_bytes` are by
    default those of the device's allocator."""
    rounding_bytes = rounding_bytes or ALLOCATOR_BLOCK_BYTES.get(device.type, 1)
    return BlockTracker(rounding_bytes, Scopes(model), blocks, timer)
