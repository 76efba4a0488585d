"""Compresses further where the predicted time of a step falls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from scipy.optimize import LinearConstraint

from velora_fx.analyse import Actions, Analysis, Candidate, Sizes
from velora_fx.choose.programs import milp
from velora_fx.devices import device_rates
from velora_fx.peaks import Peak
from velora_fx.plans import ROUNDING

Key = tuple[str, str]
SOLVER_TOLERANCE = 1e-6  # by which HiGHS may exceed a bound


def faster(
    analysis: Analysis, actions: Actions, planned: Peak, budget_bytes: int | None, max_approximation: float
) -> tuple[Actions, Peak]:
    """The actions with more compressed, also inputs that free nothing, where that makes the step faster.

    The sizes are those of most predicted time saved within `max_approximation`; nothing that is compressed gets smaller
    sub-tokens. A simulation has the last word: what is not faster in it, or above the budget, is not done. Actions that
    are above `max_approximation` themselves stay as they are.
    """
    already = approximation(analysis, actions.sizes)
    # What shares its storage frees nothing and adds its projections: where those do not fit, do without.
    for offered in (analysis.compressible, analysis.candidates):
        outside = [candidate for candidate in offered if candidate.region not in actions.recomputed]
        left = (max_approximation - already) * all_weights(analysis)
        sizes = choose_sizes(_kinds(analysis, outside, actions.sizes), left)
        found = Actions({**actions.sizes, **sizes}, actions.recomputed)
        if found == actions:
            break
        peak = analysis.peak(found)
        if peak.step_seconds < planned.step_seconds and (budget_bytes is None or peak.peak_bytes <= budget_bytes):
            return found, peak
    return actions, planned


def approximation(analysis: Analysis, sizes: Sizes) -> float:
    """The mean log2 of the sub-token size over the entries of all weights that may be compressed, 0 for none."""
    total = sum(c.num_weights * math.log2(sizes[c.key]) for c in analysis.compressible if c.key in sizes)
    return total / all_weights(analysis) if total else 0.0


def all_weights(analysis: Analysis) -> int:
    """The entries of all weights that may be compressed."""
    return sum(candidate.num_weights for candidate in analysis.compressible)


@dataclass(frozen=True)
class Kind:
    """Candidates that are alike, at size `current` now: what each larger size costs and saves for one of them."""

    keys: tuple[Key, ...]
    sizes: tuple[int, ...]
    costs: tuple[float, ...]
    seconds: tuple[float, ...]


def choose_sizes(kinds: Sequence[Kind], max_cost: float) -> dict[Key, int]:
    """The sizes that save most seconds within a cost in all: an integer program that counts candidates of a kind.

    Costs are those above what is spent already, so `max_cost` is what may still be spent.
    """
    margin = 0.0
    while max_cost > margin:
        sizes = _solved(kinds, max_cost, margin)
        if _cost(kinds, sizes) <= max_cost * (1 + ROUNDING):
            return sizes
        margin = 10 * margin or SOLVER_TOLERANCE * max(max_cost, *(max(kind.costs, default=0.0) for kind in kinds))
    return {}


def _cost(kinds: Sequence[Kind], sizes: Mapping[Key, int]) -> float:
    return math.fsum(kind.costs[kind.sizes.index(sizes[key])] for kind in kinds for key in kind.keys if key in sizes)


def _solved(kinds: Sequence[Kind], max_cost: float, margin: float) -> dict[Key, int]:
    """The sizes of most seconds saved, which cost at most that less the margin as far as the solver can tell."""
    options = [(kind, level) for kind in kinds for level, seconds in enumerate(kind.seconds) if seconds > 0]
    if not options:
        return {}
    seconds = np.array([kind.seconds[level] for kind, level in options])
    costs = np.array([kind.costs[level] for kind, level in options])
    same = np.array([[float(own is kind) for own, _ in options] for kind in kinds])
    limits = np.array([float(len(kind.keys)) for kind in kinds])
    unit = max(max_cost, costs.max())
    most = (max_cost - margin) / unit
    constraints = [LinearConstraint(same, -np.inf, limits), LinearConstraint(costs / unit, -np.inf, most)]
    result = milp(-seconds / seconds.max(), integrality=np.ones(len(options), dtype=int), constraints=constraints)
    if result.x is None:
        return {}
    chosen: dict[Key, int] = {}
    for kind in kinds:
        counted = [
            (kind.sizes[level], round(n)) for (own, level), n in zip(options, result.x, strict=True) if own is kind
        ]
        sizes = [size for size, count in sorted(counted, reverse=True) for _ in range(count)]
        chosen.update(zip(kind.keys, sizes, strict=False))
    return chosen


def _kinds(analysis: Analysis, candidates: Sequence[Candidate], sizes: Sizes) -> list[Kind]:
    alike: dict[tuple[object, ...], list[Candidate]] = {}
    for candidate in candidates:
        graphs = tuple(id(graph) for graph in analysis.findings.graphs[candidate.region])
        shapes = tuple(saving.shape for saving in candidate.savings)
        key = (graphs, candidate.tensor, candidate.consumers[0].rpartition(".")[2], shapes, sizes.get(candidate.key))
        alike.setdefault(key, []).append(candidate)
    return [_kind(analysis, group, sizes) for group in alike.values()]


def _kind(analysis: Analysis, group: Sequence[Candidate], sizes: Mapping[Key, int]) -> Kind:
    first = group[0]
    current = sizes.get(first.key, 1)
    larger = tuple(size for size in first.sizes if size > current)
    return Kind(
        keys=tuple(candidate.key for candidate in group),
        sizes=larger,
        costs=tuple(first.num_weights * math.log2(size / current) for size in larger),
        seconds=tuple(saved_seconds(analysis, first, current, size) for size in larger),
    )


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
