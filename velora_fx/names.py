"""Names of layers and numbers of bytes as text: "layers.0-31.mlp x32", "1.50 GiB"."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby, takewhile
from math import prod

UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
# The number of a layer within a dotted name; the letter before it tells it from a decimal fraction.
LAYER = re.compile(r"(?<=[A-Za-z_]\.)\d+")
Numbers = tuple[int, ...]


def in_units(size: int) -> str:
    """A number of bytes in the largest binary unit that it fills: "1.50 GiB"."""
    return next((f"{size / unit:.2f} {name}" for unit, name in UNITS if size >= unit), f"{size} B")


def compact(names: Sequence[str]) -> str:
    """Dotted names in short form: `a.q_proj`, `a.k_proj`, `b` become "a.{q,k}_proj, b"."""
    parts = []
    for parent, group in groupby((text for text, _ in collapse(names)), lambda name: name.rpartition(".")[0]):
        leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in group))
        parts.append(f"{parent}.{_braces(leaves)}" if parent else _braces(leaves))
    return ", ".join(parts)


def _braces(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    ending = "".join(shared_start([name[::-1] for name in names]))[::-1]
    ending = ending[ending.index("_") :] if "_" in ending else ""
    stems = [name.removesuffix(ending) for name in names]
    if not all(stems):
        return f"{{{','.join(names)}}}"
    return f"{{{','.join(stems)}}}{ending}"


def shared_start(sequences: Sequence[Sequence[str]]) -> list[str]:
    """What all sequences begin with."""
    return [items[0] for items in takewhile(lambda items: len(set(items)) == 1, zip(*sequences, strict=False))]


def collapse(texts: Iterable[str]) -> list[tuple[str, int]]:
    """Merges texts that differ only in layer numbers, in first-seen order, each with the number of texts in it.

    "h.0.fc" to "h.3.fc" become ("h.0-3.fc", 4).
    """
    found: dict[tuple[str, ...], list[Numbers]] = {}
    for text in dict.fromkeys(texts):
        found.setdefault(tuple(LAYER.split(text)), []).append(tuple(map(int, LAYER.findall(text))))
    merged = []
    for (start, *rest), numbers in found.items():
        for box, count in _boxes(numbers):
            layers = (_ranges(values) + part for values, part in zip(box, rest, strict=True))
            merged.append((start + "".join(layers), count))
    return merged


def _boxes(numbers: Sequence[Numbers]) -> list[tuple[list[Numbers], int]]:
    """Covers tuples of numbers by products of sets, each with the number of tuples in it.

    Places that always hold the same number (a text that names its layer twice) vary together.
    """
    columns = list(zip(*numbers, strict=True))
    first = [columns.index(column) for column in columns]
    free = sorted(set(first))
    boxes: list[tuple[Numbers, ...]] = [tuple((values[place],) for place in free) for values in numbers]
    for place in reversed(range(len(free))):
        groups: dict[tuple[Numbers, ...], set[int]] = {}
        for box in boxes:
            groups.setdefault((*box[:place], *box[place + 1 :]), set()).update(box[place])
        boxes = [(*rest[:place], tuple(sorted(values)), *rest[place:]) for rest, values in groups.items()]
    return [([box[free.index(place)] for place in first], prod(map(len, box))) for box in boxes]


def _ranges(numbers: Numbers) -> str:
    """Sorted numbers as ranges: "0-5,7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
