"""What the blocks in the middle of a stretch do, once for each block that is not shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from velora_fx.capture import UnequalError
from velora_fx.simulate.equal_blocks.block_tracker import NO_BLOCK, ShownStep
from velora_fx.simulate.equal_blocks.renaming import renaming
from velora_fx.simulate.equal_blocks.shorten import Stretch
from velora_fx.simulate.timeline import Label, Place, Timeline

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class _Pair:
    """The events of the second and of the third block that is shown, from one boundary to the next."""

    second: tuple[int, int]
    third: tuple[int, int]

    @property
    def is_forward(self) -> bool:
        """True where the second comes before the third."""
        return self.second < self.third

    @property
    def between(self) -> int:
        """The event before which those of the blocks between them would be."""
        return max(self.second[0], self.third[0])


class Repetition:
    """Repeats what the blocks in the middle of a stretch do; `first` is the number of its first block that is shown."""

    def __init__(self, step: ShownStep, first: int, stretch: Stretch) -> None:
        self.step, self.first, self.stretch = step, first, stretch
        self.timeline = step.timeline
        self.count = stretch.num_copies
        self.owners = _filled(np.array(step.owners), [start for start, _ in self.timeline.marks], first)
        self.pairs = self._find_pairs()
        self.place = {  # of events in the middle blocks: the pair, the block (0 or 1), and the number within
            event: (number, block, event - start)
            for number, pair in enumerate(self.pairs)
            for block, (start, end) in enumerate((pair.second, pair.third))
            for event in range(start, end)
        }
        births = self.timeline.births
        self.born = np.array([births[storage] for storage in self.timeline.storages.tolist()], dtype=np.int64)

    def _find_pairs(self) -> list[_Pair]:
        owners = self.owners
        starts = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist()] if len(owners) else []
        bounds = [*starts, len(owners)]
        for start, _ in self.timeline.marks:  # a moment ends a block's events too
            if start not in bounds and start < len(owners):
                bounds.append(start)
        bounds.sort()
        parts = [(int(owners[a]), a, b) for a, b in pairwise(bounds) if a < b]
        pairs, index = [], 0
        second, third = self.first + 1, self.first + 2
        while index < len(parts):
            owner, start, end = parts[index]
            if owner in (second, third):
                other = parts[index + 1] if index + 1 < len(parts) else (NO_BLOCK, 0, 0)
                if {owner, other[0]} != {second, third}:
                    raise UnequalError("equal blocks do not run one after the other")
                spans = {owner: (start, end), other[0]: other[1:]}
                pairs.append(_Pair(spans[second], spans[third]))
                index += 1
            index += 1
        for pair in pairs:
            if pair.second[1] - pair.second[0] != pair.third[1] - pair.third[0]:
                raise UnequalError("equal blocks allocate differently often")
        return pairs

    @cached_property
    def tokens(self) -> list[list[tuple[int, int, int]]]:
        """What happens in each pair's blocks: (pair, number, how many blocks further) of the birth of the storage that
        is born (itself) or freed."""
        found = []
        for pair in self.pairs:
            length, tokens = pair.second[1] - pair.second[0], []
            for k in range(length):
                events = pair.second[0] + k, pair.third[0] + k
                self._check_alike(*events)
                here = [self._reference(event, block) for block, event in enumerate(events)]
                tokens.append(self._agreed(here))
            found.append(tokens)
        return found

    def _check_alike(self, one: int, other: int) -> None:
        timeline = self.timeline
        a, b = (int(timeline.storages[event]) for event in (one, other))
        is_birth = self.born[one] == one, self.born[other] == other
        if timeline.deltas[one] != timeline.deltas[other] or is_birth[0] != is_birth[1]:
            raise UnequalError("equal blocks allocate different sizes")
        if timeline.category(a) != timeline.category(b):
            raise UnequalError("what equal blocks make is of different use")

    def _reference(self, event: int, block: int) -> tuple[int, int, int] | None:
        """Where what is born or freed here was born, in relation to this block; None for one in no middle block."""
        place = self.place.get(int(self.born[event]))
        if place is None:
            return None
        pair, born_in, number = place
        return pair, number, born_in - block

    def _agreed(self, here: Sequence[tuple[int, int, int] | None]) -> tuple[int, int, int]:
        second, third = here
        if second is not None and third is not None:
            if second != third or second[2] != 0:
                raise UnequalError("equal blocks free different things")
            return second
        if second is None and third is not None and third[2] == -1:  # of the block before
            return third
        if third is None and second is not None and second[2] == 1:  # of the block after
            return second
        raise UnequalError("equal blocks free different things")

    @cached_property
    def together(self) -> dict[int, list[int]]:
        """By the last event of some that free, outside of the blocks, what both middle blocks have made: the storages
        of the third. What the other blocks have made is freed there too."""
        deaths, found = self.timeline.deaths, dict[int, list[int]]()
        for pair in self.pairs:
            for k in range(pair.second[1] - pair.second[0]):
                events = pair.second[0] + k, pair.third[0] + k
                if self.born[events[0]] != events[0]:
                    continue
                ends = [deaths.get(int(self.timeline.storages[event])) for event in events]
                inside = [end is not None and end in self.place for end in ends]
                if ends == [None, None] or all(inside):
                    continue
                if any(inside):
                    side = inside.index(False)  # the block that ends outside, by one next to it
                    end = ends[side]
                    if end is None or self.owners[end] != (self.first if side == 0 else self.first + 3):
                        raise UnequalError("what equal blocks make is freed in different places")
                    continue
                if ends[0] is None or ends[1] is None:
                    raise UnequalError("what equal blocks make is kept of one and not of the other")
                last = max(ends[0], ends[1])
                first = min(ends[0], ends[1])
                is_parted = any(first < start <= last for start, _ in self.timeline.marks)
                if is_parted or np.any(self.timeline.deltas[first : last + 1] > 0):
                    raise UnequalError("what equal blocks make is freed at different times")
                found.setdefault(last, []).append(int(self.timeline.storages[events[1]]))
        return found

    @cached_property
    def alike(self) -> dict[tuple[int, int], tuple[int, ...]]:
        """By pair and number within: the storages that are born there in the second block, in those that are not shown,
        and in the third, in the order of the blocks."""
        storages, following = self.timeline.storages.tolist(), max(self.timeline.births, default=-1) + 1
        found = {}
        for number, pair in enumerate(self.pairs):
            for k in range(pair.second[1] - pair.second[0]):
                second, third = pair.second[0] + k, pair.third[0] + k
                if self.born[third] == third:
                    copies = range(following, following + self.count)
                    following += self.count
                    found[number, k] = (storages[second], *copies, storages[third])
        return found

    @cached_property
    def others_of(self) -> dict[int, tuple[int, tuple[int, ...]]]:
        """Of storages of the second (0) and of the third block (1): which of the two, and those that are alike."""
        return {ids[-block]: (block, ids) for ids in self.alike.values() for block in (0, 1)}

    @cached_property
    def _pieces(self) -> list[_Piece]:
        """What is inserted, in order: what each pair's other blocks do, and what is freed together."""
        pieces = []
        for number, pair in enumerate(self.pairs):
            order = range(1, self.count + 1) if pair.is_forward else range(self.count, 0, -1)
            storages = [self.alike[p, k][block + d] for block in order for p, k, d in self.tokens[number]]
            deltas = np.tile(self.timeline.deltas[slice(*pair.third)], self.count)
            pieces.append(_Piece(pair.between, storages, deltas, self.first + 1, number))
        for event, thirds in self.together.items():
            storages = [copy for third in thirds for copy in self.others_of[third][1][1:-1]]
            sizes = [-int(self.timeline.deltas[self.timeline.births[third]]) for third in thirds]
            pieces.append(_Piece(event + 1, storages, np.repeat(np.array(sizes, dtype=np.int64), self.count), NO_BLOCK))
        return sorted(pieces, key=lambda piece: piece.event)

    def moved(self, event: int) -> int:
        """The new number of an event, or of the end of all."""
        return event + sum(len(piece.storages) for piece in self._pieces if piece.event <= event)

    @cached_property
    def _begins(self) -> list[int]:
        """The new number of the first event that is inserted for each pair."""
        found, before = {}, 0
        for piece in self._pieces:
            found[piece.pair] = piece.event + before
            before += len(piece.storages)
        return [found[number] for number in range(len(self.pairs))]

    def begin(self, number: int, block: int) -> int:
        """The new number of the event with which a block begins in a pair: 0 is the second block that is shown, then
        come those that are not."""
        pair = self.pairs[number]
        if block == 0:
            return self.moved(pair.second[0])
        if block == self.count + 1:
            return self.moved(pair.third[0])
        before = block - 1 if pair.is_forward else self.count - block
        return self._begins[number] + before * (pair.third[1] - pair.third[0])

    @cached_property
    def repeated(self) -> ShownStep:
        """The step with all blocks of the stretch."""
        timeline, pieces = self.timeline, self._pieces
        positions = np.repeat([piece.event for piece in pieces], [len(piece.storages) for piece in pieces])
        owners = [np.full(len(piece.storages), piece.owner) for piece in pieces]
        labels, categories = list(timeline.labels), dict(timeline.categories)
        labels += [Label("")] * (len(self.alike) * self.count)
        for ids in self.alike.values():
            label, category = timeline.labels[ids[-1]], timeline.categories.get(ids[-1])
            for copy, rename in zip(ids[1:-1], self.renamings, strict=True):
                labels[copy] = label._replace(where=rename(label.where))
                if category is not None:
                    categories[copy] = category
        returned, alike = timeline.returned, self.others_of
        also = [copy for s in returned.storages if s in alike and alike[s][0] for copy in alike[s][1][1:-1]]
        made = Timeline(
            np.insert(self._storages, positions, np.concatenate([piece.storages for piece in pieces])),
            np.insert(timeline.deltas, positions, np.concatenate([piece.deltas for piece in pieces])),
            categories,
            tuple((self.moved(start), name) for start, name in timeline.marks),
            tuple(labels),
            self._places,
            timeline.seconds,
            replace(returned, event=self.moved(returned.event), storages=(*returned.storages, *also)),
        )
        all_owners = np.insert(np.array(self.step.owners), positions, np.concatenate(owners))
        return replace(self.step, timeline=made, owners=tuple(all_owners.tolist()))

    @cached_property
    def renamings(self) -> list[Callable[[str], str]]:
        """For each block that is not shown, what makes names and texts of the third block its own."""
        third = self.stretch.stands_for[self.stretch.shown[2]]
        return [renaming({third: name}) for name in self.stretch.names[2:-2]]

    @property
    def _storages(self) -> Ints:
        """The storages of the events that are shown: the two blocks free what their new neighbours have made."""
        storages: Ints = self.timeline.storages.copy()
        for number, pair in enumerate(self.pairs):
            for k, (born_pair, born_at, distance) in enumerate(self.tokens[number]):
                if distance == 1:
                    storages[pair.second[0] + k] = self.alike[born_pair, born_at][1]
                elif distance == -1:
                    storages[pair.third[0] + k] = self.alike[born_pair, born_at][self.count]
        return storages

    @property
    def _places(self) -> tuple[Place, ...]:
        found = [place._replace(event=self.moved(place.event)) for place in self.timeline.places]
        for number, pair in enumerate(self.pairs):
            start, end = pair.third
            inside = [place for place in self.timeline.places if start <= place.event < end]
            for block, rename in enumerate(self.renamings, 1):
                begin = self.begin(number, block) - start
                found += [Place(begin + event, rename(name), rename(scope)) for event, name, scope in inside]
        return tuple(sorted(found, key=lambda place: place.event))


@dataclass(frozen=True)
class _Piece:
    """Events to insert before the one of this number, of a block and, where they are a pair's, of that pair."""

    event: int
    storages: list[int]
    deltas: Ints
    owner: int
    pair: int = -1


def _filled(owners: Ints, moments: Sequence[int], first: int) -> Ints:
    """The owner of each event among the blocks of a stretch: what is of no block belongs to the one before, within a
    moment of the step."""
    blocks = range(first, first + 4)
    filled, current, starts = [], NO_BLOCK, set(moments)
    for event, owner in enumerate(owners.tolist()):
        if event in starts:
            current = NO_BLOCK
        if owner in blocks:
            current = owner
        elif owner != NO_BLOCK:
            current = NO_BLOCK
        filled.append(current)
    return np.array(filled, dtype=np.int64)
