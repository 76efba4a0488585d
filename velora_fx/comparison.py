"""The predicted peak beside the measured one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from velora_fx.overhead import CONTEXT, FRAGMENTATION, SLACK, WORKSPACES

if TYPE_CHECKING:
    from velora_fx.timeline import Measured, Peak

TOLERANCE = 0.05


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
