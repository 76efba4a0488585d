"""Plans along the budget: within it, and never more approximate or higher for more of it."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from functools import partialmethod

import pytest
import torch
from torch import Tensor, nn

import velora_fx
import velora_fx.choose.search
from tests.helpers.gradients import tightest
from tests.helpers.toys import AfterBlocks, rows, stack, without_dropout
from tests.helpers.zoo import ZOO, loss_of
from velora_fx.analyse import Actions, Analysis, analyse
from velora_fx.choose.search import Search
from velora_fx.choose.solver import RELATIVE_GAP, Program
from velora_fx.options import Options

CASES = {case.name: case for case in ZOO}
POINTS = 20


def analysis_of(name: str) -> Analysis:
    case = CASES[name]
    options = Options(loss_fn=loss_of, optimizer="sgd")
    shape = (8, 48) if case.paddable else (8, case.shapes[0][1])
    return analyse(case.build(), (), case.batch(*shape), options, torch.device("cpu"), lambda step: None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit", "qwen3"])
def test_along_twenty_budgets_peaks_rise_and_approximation_falls(name: str) -> None:
    analysis = analysis_of(name)
    search = Search(analysis, compresses=True, recomputes=False)
    smallest, untouched = search.tightest[1].peak_bytes, analysis.baseline.peak_bytes
    assert smallest < untouched
    peaks, costs = [], []
    for number in range(POINTS):
        budget = smallest + (untouched - smallest) * number // (POINTS - 1)
        actions, peak = search.within(budget)
        assert peak.peak_bytes <= budget
        peaks.append(peak.peak_bytes)
        costs.append(search.problem.cost(actions))
    assert costs[-1] == 0 and peaks[-1] == untouched
    assert all(less >= more for less, more in itertools.pairwise(costs))
    assert all(less <= more for less, more in itertools.pairwise(peaks))


def test_which_of_equally_dear_solutions_the_solver_finds_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = analysis_of("gpt2")
    peaks = []
    for seed in (0, 3):
        monkeypatch.setattr(Program, "levels_within", partialmethod(among_equals, seed=seed))
        search = Search(analysis, compresses=True, recomputes=False)
        smallest, untouched = search.tightest[1].peak_bytes, analysis.baseline.peak_bytes
        budgets = [smallest + (untouched - smallest) * number // 19 for number in (1, 18)]
        peaks.append([search.within(budget)[1].peak_bytes for budget in budgets])
    assert peaks[0] == peaks[1]


LEVELS_WITHIN = Program.levels_within


def among_equals(program: Program, budget_bytes: int, seed: int) -> tuple[int, ...] | None:
    """`levels_within` with costs that differ within its gap, differently for each budget."""
    chance = random.Random(seed + budget_bytes)
    noisy = [
        replace(item, costs=tuple(cost * (1 + 0.9 * RELATIVE_GAP * chance.random()) for cost in item.costs))
        for item in program.items
    ]
    return LEVELS_WITHIN(Program(noisy, program.moments), budget_bytes)


@pytest.mark.parametrize("tried", [(), (0, 4), (1, 2, 3, 6)])
@pytest.mark.parametrize(("rung", "lowest"), [(0, 0), (1, 0), (2, 2), (4, 2), (5, 5), (6, 5)])
def test_the_lowest_rung_of_a_cost_is_found(
    rung: int, lowest: int, tried: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = (math.inf, math.inf, 7.0, 7.0 * (1 + RELATIVE_GAP / 2), 7.0, 3.0, 3.0)
    monkeypatch.setattr(Search, "_cost", lambda self, rung: costs[rung])
    monkeypatch.setattr(Search, "_reached", lambda self, rung: rung)
    search = Search(None, compresses=True, recomputes=False)
    search._solved.update(dict.fromkeys(tried))
    assert search._lowest_alike(rung) == lowest


def compiled_search(model: nn.Module, batch: dict[str, Tensor]) -> Search:
    options = Options(compiled=True, optimizer="sgd", loss_fn=lambda output: output)
    analysis = analyse(model, (), batch, options, torch.device("cpu"), lambda step: None)
    return Search(analysis, compresses=True, recomputes=False)


@pytest.mark.slow
def test_sub_tokens_grow_where_projections_are_too_large_in_backward() -> None:
    search = compiled_search(without_dropout(stack(num_blocks=2)), {"x": rows(64, 64)})
    at_two = Actions({candidate.key: 2 for candidate in search.analysis.candidates})
    budget = search.analysis.peak(at_two).peak_bytes - 1
    actions, peak = search.within(budget)
    assert search.tightest[1].peak_bytes <= peak.peak_bytes <= budget
    assert min(actions.sizes.values()) > 2
    assert max(actions.sizes.values()) < max(search.tightest[0].sizes.values())


@pytest.mark.slow
def test_a_compiled_plan_leaves_little_of_its_budget() -> None:
    search = compiled_search(without_dropout(stack(num_blocks=6)), {"x": rows(64, 64)})
    smallest, untouched = search.tightest[1].peak_bytes, search.analysis.baseline.peak_bytes
    for share in (0.3, 0.7):
        budget = smallest + int(share * (untouched - smallest))
        actions, peak = search.within(budget)
        assert actions.sizes and budget - 0.2 * (untouched - smallest) <= peak.peak_bytes <= budget


def test_the_smallest_peak_with_recompute_is_that_of_both_together() -> None:
    torch.manual_seed(0)
    options = Options(optimizer="none", loss_fn=lambda output: output)
    batch = {"x": rows(64, 64, 64)}
    analysis = analyse(AfterBlocks().train(), (), batch, options, torch.device("cpu"), lambda step: None)
    both = Search(analysis, compresses=True, recomputes=True).tightest[1].peak_bytes
    for kinds in ((True, False), (False, True)):
        assert both < Search(analysis, *kinds).tightest[1].peak_bytes


def test_what_frees_least_where_all_is_recomputed_is_left_as_it_is() -> None:
    options = Options(optimizer="sgd", loss_fn=lambda output: output)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model, batch = without_dropout(stack(num_blocks=4)), {"x": rows(64, 64)}
        analysis = analyse(model, (), batch, options, torch.device("cpu"), lambda step: None)
        search = Search(analysis, compresses=True, recomputes=True)
        actions, peak = search.tightest
        others = [search.problem.all_at(-1), search.problem.all_recomputed()]
        assert peak.tensor_bytes < 0.96 * min(analysis.peak(other).tensor_bytes for other in others)
        assert len(actions.recomputed) < 4


class Modulated(nn.Module):
    """A block like a diffusion transformer's: norms scaled and shifted by what a linear makes of a condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation, self.norm = nn.Linear(width, 3 * width), nn.LayerNorm(width, elementwise_affine=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift, gate = self.modulation(nn.functional.silu(condition)).unsqueeze(1).chunk(3, -1)
        h = self.norm(x) * (1 + scale) + shift
        return x + gate * self.down(nn.functional.gelu(self.up(h)))  # type: ignore[no-any-return]


class Diffusion(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.blocks, self.out = nn.ModuleList(Modulated(width) for _ in range(4)), nn.Linear(width, 8)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, condition)
        return self.out(x).square().mean()  # type: ignore[no-any-return]


def toy_search(model: nn.Module, *args: Tensor) -> Search:
    options = Options(optimizer="sgd", loss_fn=lambda output: output)
    analysis = analyse(model.train(), args, {}, options, torch.device("cpu"), lambda step: None)
    return Search(analysis, compresses=True, recomputes=False)


TOYS = {
    "modulated": lambda: toy_search(Diffusion(), rows(8, 128, 64), rows(1, 8, 64)[0]),
    "after blocks": lambda: toy_search(AfterBlocks(), rows(64, 64, 64)),
    "stack": lambda: toy_search(without_dropout(stack(num_blocks=4)), rows(64, 64)),
}


@pytest.mark.parametrize(
    "name", ["modulated", *(pytest.param(n, marks=pytest.mark.slow) for n in TOYS if n != "modulated")]
)
def test_no_plan_is_dearer_than_everything_at_one_size_that_fits(name: str) -> None:
    search = TOYS[name]()
    smallest, untouched = search.tightest[1].peak_bytes, search.analysis.baseline.peak_bytes
    most = max(len(candidate.sizes) for candidate in search.analysis.candidates)
    at_one_size = [search.problem.all_at(index) for index in range(most)]
    for number in range(POINTS):
        budget = smallest + (untouched - smallest) * number // (POINTS - 1)
        actions, peak = search.within(budget)
        assert peak.peak_bytes <= budget
        fitting = [one for one in at_one_size if search.analysis.peak(one).peak_bytes <= budget]
        assert search.problem.cost(actions) <= min(map(search.problem.cost, fitting))


def test_where_the_solver_finds_nothing_cheap_everything_at_one_size_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    search = TOYS["modulated"]()
    smallest, untouched = search.tightest[1].peak_bytes, search.analysis.baseline.peak_bytes
    monkeypatch.setattr(Program, "levels_within", lambda *_: None)
    actions, peak = search.within(smallest + (untouched - smallest) // 3)
    assert actions == search.problem.all_at(1) and peak.peak_bytes < smallest + (untouched - smallest) // 3


@pytest.mark.parametrize("method", ["compress", "auto"])
def test_a_budget_of_one_byte_is_answered_with_the_plan_of_the_smallest_peak(method: str) -> None:
    model, batch = stack(width=64), (rows(64, 64, 64),)
    with pytest.raises(velora_fx.BudgetError) as raised:
        velora_fx.plan(model, 1e-9, batch, optimizer="none", method=method)
    found, expected = raised.value.plan, tightest(model, batch, method=method)
    assert found.decisions == expected.decisions and found.recomputed == expected.recomputed
    assert found.planned == expected.planned
