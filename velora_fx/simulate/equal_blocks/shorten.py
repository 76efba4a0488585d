"""Which few of a model's equal blocks stand for all of them in a simulated step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from velora_fx.capture import LeftOut, PassedOn, note_calls
from velora_fx.simulate.equal_blocks.rows import SHOWN


@dataclass(frozen=True)
class Stretch:
    """Blocks in a row that are equal and treated alike, and those that are `shown`: as many, or SHOWN for more.

    The first and the last two of those shown stand for the first and the last two.
    """

    names: tuple[str, ...]
    shown: tuple[str, ...]

    @property
    def num_copies(self) -> int:
        """How many blocks are not shown: they would be in the middle of those that are."""
        return len(self.names) - len(self.shown)

    @property
    def stands_for(self) -> dict[str, str]:
        """The block that each shown one stands for."""
        half = SHOWN // 2
        names = self.names if not self.num_copies else (*self.names[:half], *self.names[-half:])
        return dict(zip(self.shown, names, strict=True))


@dataclass(frozen=True)
class Shortened:
    """A model with few of its equal blocks: its stretches, one row of equal blocks after the other, and the blocks that
    are left out, each with the last one that is shown before it."""

    stretches: tuple[Stretch, ...]
    left_out: tuple[tuple[str, str], ...]

    @property
    def shown(self) -> tuple[str, ...]:
        """The blocks of all stretches that are shown."""
        return tuple(name for stretch in self.stretches for name in stretch.shown)

    @property
    def stands_for(self) -> dict[str, str]:
        """The block that each shown one of the stretches stands for."""
        return {shown: name for stretch in self.stretches for shown, name in stretch.stands_for.items()}


WHOLE = Shortened((), ())


def shorten(rows: Sequence[Sequence[str]], treatment: Callable[[str], Hashable]) -> Shortened:
    """Shows as few blocks of each row as tell what all do, of which `treatment` says what is done about each."""
    stretches: list[Stretch] = []
    left_out: list[tuple[str, str]] = []
    for row in rows:
        used = 0
        for _, group in groupby(row, key=treatment):
            names = tuple(group)
            num_shown = min(len(names), SHOWN)
            stretches.append(Stretch(names, tuple(row[used : used + num_shown])))
            used += num_shown
        left_out += [(name, row[used - 1]) for name in row[used:]]
    return Shortened(tuple(stretches), tuple(left_out))


def stand_ins(model: torch.nn.Module, shortened: Shortened) -> tuple[dict[int, torch.nn.Module], dict[str, PassedOn]]:
    """What takes the places of blocks in a copy of the model, by their ids, and what the shown ones, by name, have to
    note for that."""
    noting = {before: PassedOn() for _, before in shortened.left_out}
    made: dict[int, torch.nn.Module] = {
        id(model.get_submodule(name)): LeftOut(noting[before]) for name, before in shortened.left_out
    }
    return made, noting


def note_all(model: torch.nn.Module, noting: dict[str, PassedOn]) -> None:
    """Has the blocks of a copy note what those that are left out after them pass on."""
    for name, passed_on in noting.items():
        note_calls(model.get_submodule(name), passed_on)
