"""The plain call meets every budget between the tightest exact step and the untouched one, at a price that falls."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

import velora_fx
from tests.helpers.peaks import measured_peak
from tests.helpers.toys import without_dropout
from tests.helpers.zoo import IMAGE, ZOO, loss_of
from velora_fx.analyse import Actions, Analysis, analyse
from velora_fx.choose.planner import Planner
from velora_fx.choose.price import FAIR_SHARE
from velora_fx.choose.problem import Problem
from velora_fx.options import Options

CASES = {case.name: case for case in ZOO}
NUM_BUDGETS = {"eager": 10, "inductor": 3}  # a compiled plan takes longer


@pytest.mark.parametrize(
    ("name", "target"),
    [
        pytest.param(name, target, marks=[pytest.mark.slow] * ((name, target) != ("llama", "eager")))
        for name, target in (
            *itertools.product(("llama", "gpt2", "bert", "vit"), ("eager",)),
            *itertools.product(("llama", "vit"), ("inductor",)),
        )
    ],
)
def test_every_budget_is_met_and_with_more_memory_neither_price_nor_free_memory_grows(name: str, target: str) -> None:
    case = CASES[name]
    model = without_dropout(case.build())
    batch = case.batch(4, IMAGE)
    options = Options(optimizer="sgd", compiled=target == "inductor", loss_fn=loss_of)
    planner = Planner(analyse(model, (), batch, options, torch.device("cpu"), lambda step: None), name, options)
    untouched, exact = planner.analysis.baseline, planner.tightest("exact")[1]
    problem, found = Problem(planner.analysis, compresses=True, recomputes=True), []
    count = NUM_BUDGETS[target]
    for number in range(count):
        budget_bytes = exact.peak_bytes + (untouched.peak_bytes - exact.peak_bytes) * number // count
        plan = planner.plan(budget_bytes)
        planned = velora_fx.apply(copy.deepcopy(model), plan, batch)
        measured = measured_peak(planned, batch, target, loss_of)
        assert measured <= 1.002 * budget_bytes
        found.append((problem.cost(actions_of(plan, planner.analysis)), -plan.planned.peak_bytes))
        is_fair = exact.step_seconds <= (1 + FAIR_SHARE) * untouched.step_seconds
        assert not is_fair or (plan.largest_sub_token or 0) <= 8
    for prices_or_peaks in zip(*found, strict=True):
        assert all(tight >= loose for tight, loose in itertools.pairwise(prices_or_peaks))


def actions_of(plan: velora_fx.Plan, analysis: Analysis) -> Actions:
    """What the plan does, as the planner has it."""
    keys = {(candidate.region, candidate.tensor): candidate.key for candidate in analysis.candidates}
    sizes = {keys[d.region, d.tensor]: d.sub_token_size for d in plan.compressed if d.sub_token_size is not None}
    return Actions(sizes, {block.region: block.recompute for block in plan.recomputed})


@pytest.mark.parametrize("name", ["llama", pytest.param("vit", marks=pytest.mark.slow)])
def test_nothing_is_done_where_the_untouched_step_fits_and_training_is_the_same_to_the_bit(name: str) -> None:
    case = CASES[name]
    model, batch = case.build(), case.batch(4, IMAGE)
    planned = copy.deepcopy(model)
    untouched = velora_fx.plan(model, None, batch, optimizer="sgd").baseline.peak_bytes
    velora_fx.optimize(planned, untouched / 2**30, batch, optimizer="sgd")
    plan = velora_fx.plan_of(planned)
    assert not plan.compressed and not plan.recomputed
    for one in (model, planned):
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(one(**batch)).backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), planned.parameters(), strict=True))
