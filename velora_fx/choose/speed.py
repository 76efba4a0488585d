"""Compresses further where the predicted time of a step falls."""

from __future__ import annotations

from math import prod

import torch

from velora_fx.analyse import Actions, Analysis, Candidate
from velora_fx.devices import device_rates
from velora_fx.peaks import Peak


def faster(
    analysis: Analysis, actions: Actions, planned: Peak, budget_bytes: int | None, largest: int
) -> tuple[Actions, Peak]:
    """The actions with more compressed, also inputs that free nothing, where that makes the step faster.

    Each input gets the size up to `largest` that saves most predicted time; nothing that is compressed gets smaller
    sub-tokens. A simulation has the last word: what is not faster in it, or above the budget, is not done.
    """
    # What shares its storage frees nothing and adds its projections: where those do not fit, do without.
    for offered in (analysis.compressible, analysis.candidates):
        sizes = dict(actions.sizes)
        for candidate in offered:
            size = _fastest_size(analysis, candidate, actions.sizes.get(candidate.key, 1), largest)
            if size is not None and candidate.region not in actions.recomputed:
                sizes[candidate.key] = size
        if sizes == actions.sizes:
            break
        found = Actions(sizes, actions.recomputed)
        peak = analysis.peak(found)
        if peak.step_seconds < planned.step_seconds and (budget_bytes is None or peak.peak_bytes <= budget_bytes):
            return found, peak
    return actions, planned


def _fastest_size(analysis: Analysis, candidate: Candidate, current: int, largest: int) -> int | None:
    """The size above the current one (1: not compressed) that saves most time, None if none saves any."""
    larger = [size for size in candidate.sizes if current < size <= largest]
    seconds = {size: saved_seconds(analysis, candidate, current, size) for size in larger}
    best = max(seconds, key=lambda size: seconds[size], default=None)
    return best if best is not None and seconds[best] > 0 else None


def saved_seconds(analysis: Analysis, candidate: Candidate, current: int, size: int) -> float:
    """The predicted time that a step saves with a candidate at a size of sub-tokens instead of the current one, 1 for
    not compressed."""
    before, after = (_gradient_seconds(analysis, candidate, size) for size in (current, size))
    return before - after


def _gradient_seconds(analysis: Analysis, candidate: Candidate, size: int) -> float:
    """The time of a candidate's weight gradients at a size of sub-tokens: the roofline model.

    Compiled code projects in the kernel that makes the input, so that its projections cost what they are to write.
    """
    rates = device_rates(analysis.device)
    consumers: dict[tuple[str, str, int], dict[str | None, int]] = {}
    for saving, num_weights in zip(candidate.savings, candidate.weights_of, strict=True):
        consumers.setdefault((saving.region, saving.x, saving.storage), {})[saving.consumer] = num_weights
    inputs = {(saving.region, saving.x, saving.storage): saving for saving in candidate.savings}
    total = 0.0
    for key, saving in inputs.items():
        assert saving.dtype is not None
        dtype = _product_dtype(saving.dtype, analysis.device.type)
        rows, width = prod(saving.shape[:-1]), saving.shape[-1]
        out, groups = sum(consumers[key].values()) // width, width // size
        operations = [(dtype, rows * (out + groups) + out * groups, 2.0 * rows * groups * out)]
        if size > 1:
            operations.append((saving.dtype, rows * groups if analysis.is_compiled else rows * (width + groups), 0.0))
            operations.append((dtype, out * (groups + width), 0.0))
        for kind, entries, flops in operations:
            moved = entries * kind.itemsize / rates.bytes_per_second
            total += max(moved, rates.matmul_seconds(flops, kind), rates.launch_seconds)
    return total


def _product_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """What a product with an input of this dtype is computed in: the dtype of autocast where that is on."""
    is_cast = torch.is_autocast_enabled(device_type) and dtype != torch.float64
    return torch.get_autocast_dtype(device_type) if is_cast else dtype
