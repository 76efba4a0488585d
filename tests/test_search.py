"""Plans along the budget: within it, and never more approximate or higher for more of it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.zoo import ZOO, loss_of
from velora_fx.analysis import Analysis, analyse
from velora_fx.options import Options
from velora_fx.search import Search

CASES = {case.name: case for case in ZOO}
POINTS = 20


def analysis_of(name: str) -> Analysis:
    case = CASES[name]
    options = Options(loss_fn=loss_of, optimizer="sgd")
    shape = (8, 48) if case.paddable else (8, case.shapes[0][1])
    return analyse(case.build(), (), case.batch(*shape), options, torch.device("cpu"), lambda step: None)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "qwen3"])
def test_along_twenty_budgets_peaks_rise_and_approximation_falls(name: str) -> None:
    analysis = analysis_of(name)
    search = Search(analysis, compresses=True, recomputes=False)
    smallest, untouched = search.tightest[1].peak_bytes, analysis.baseline.peak_bytes
    assert smallest < untouched
    weights = {candidate.key: candidate.num_weights for candidate in analysis.candidates}
    peaks, costs = [], []
    for number in range(POINTS):
        budget = smallest + (untouched - smallest) * number // (POINTS - 1)
        actions, peak = search.within(budget)
        assert peak.peak_bytes <= budget
        peaks.append(peak.peak_bytes)
        costs.append(sum(weights[key] * math.log2(size) for key, size in actions.sizes.items()))
    assert costs[-1] == 0 and peaks[-1] == untouched
    assert all(less >= more for less, more in itertools.pairwise(costs))
    assert all(less <= more for less, more in itertools.pairwise(peaks))
