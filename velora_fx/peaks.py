"""The peaks of training steps as plain values: predicted, measured, and one beside the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# What a device holds besides tensors, by name.
CONTEXT, WORKSPACES, SLACK, FRAGMENTATION = "CUDA context", "cuBLAS workspaces", "allocator slack", "fragmentation"
TOLERANCE = 0.05


@dataclass(frozen=True)
class Curve:
    """Memory over a step at a few hundred points: the bytes of each category, and the first point of each moment."""

    categories: Mapping[str, tuple[int, ...]]
    moments: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Group:
    """Storages with one label but for the numbers of layers in it: the label, how many there are, and their bytes."""

    label: str
    count: int
    num_bytes: int


@dataclass(frozen=True)
class Peak:
    """The highest point of a step: its bytes, the bytes of each category then, and the moment ("backward", ...).

    `place` is the moment to the point ("backward of model.layers.31.mlp"), `there` the tensors of one shape that take
    most of what is in use of that module then; `largest` is what takes most of all, besides parameters and buffers.
    `curve` is the way there and on, `timeline` all of its events; `step_seconds` is the
    predicted time of the whole step. `overhead` is what the device holds besides the tensors, by name, a part of the
    peak.
    """

    peak_bytes: int
    breakdown: Mapping[str, int]
    moment: str
    curve: Curve | None = None
    step_seconds: float = 0.0
    place: str = ""
    there: Group | None = None
    largest: tuple[Group, ...] = ()
    overhead: Mapping[str, int] = field(default_factory=dict)
    timeline: Any = field(default=None, compare=False, repr=False)

    @property
    def tensor_bytes(self) -> int:
        """The peak without the overhead."""
        return self.peak_bytes - sum(self.overhead.values())

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles, also those of a model that is optimised, leave the events behind: they can be large."""
        return {**vars(self), "timeline": None}


@dataclass(frozen=True)
class Measured:
    """The highest point of a real step: bytes of tensors and, on CUDA, of what the allocator had reserved.

    `breakdown` is what the tensors were: the model's and the optimizer's as counted at the end of the step, gradients
    as many of them as the plan has at its peak, on CUDA also what was there besides; the rest are activations and
    temporary tensors. `inputs` are the shapes of the largest inputs in that step, as far as they were seen.
    """

    allocated_bytes: int
    reserved_bytes: int | None
    breakdown: Mapping[str, int]
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """Bytes as predicted and as measured."""

    name: str
    predicted_bytes: int
    measured_bytes: int

    @property
    def difference_percent(self) -> float | None:
        """How far the prediction is above the measurement, in percent of that; None where nothing was measured."""
        if not self.measured_bytes:
            return None
        return 100 * (self.predicted_bytes / self.measured_bytes - 1)


def compare_peaks(predicted: Peak, measured: Measured) -> tuple[Pair, ...]:
    """The peak of the allocated tensors first, on CUDA that of reserved memory next.

    cuBLAS takes its workspaces from PyTorch's allocator, which knows nothing of the CUDA context.
    """
    allocated = predicted.tensor_bytes + predicted.overhead.get(WORKSPACES, 0)
    pairs = [Pair("allocated", allocated, measured.allocated_bytes)]
    if measured.reserved_bytes is not None:
        reserved = predicted.peak_bytes - predicted.overhead.get(CONTEXT, 0)
        pairs.append(Pair("reserved", reserved, measured.reserved_bytes))
    return tuple(pairs)


def compare_categories(predicted: Peak, measured: Measured) -> tuple[Pair, ...]:
    """What was allocated at the peak, by category; "other" is what neither the model nor its step allocated."""
    named = dict(predicted.breakdown)
    named["activations and temporary"] = named.pop("activations", 0) + named.pop("temporary", 0)
    named["other"] = predicted.overhead.get(WORKSPACES, 0)
    return tuple(Pair(name, named.get(name, 0), size) for name, size in measured.breakdown.items())


def mismatch(predicted: Peak, measured: Measured) -> tuple[Pair, Pair] | None:
    """The peak of which the prediction is off by more than 5%, and the category that differs most; None for a good one.

    The workspaces of cuBLAS may be smaller than planned for, and reserved memory may be below the prediction.
    """
    allocated, *reserved = compare_peaks(predicted, measured)
    nearest = min(max(allocated.measured_bytes, predicted.tensor_bytes), allocated.predicted_bytes)
    if abs(nearest - allocated.measured_bytes) > TOLERANCE * allocated.measured_bytes:
        categories = compare_categories(predicted, measured)
        return allocated, max(categories, key=lambda pair: abs(pair.predicted_bytes - pair.measured_bytes))
    for pair in reserved:
        if pair.predicted_bytes < (1 - TOLERANCE) * pair.measured_bytes:
            planned = predicted.overhead.get(SLACK, 0) + predicted.overhead.get(FRAGMENTATION, 0)
            return pair, Pair("fragmentation", planned, pair.measured_bytes - allocated.measured_bytes)
    return None
