"""Blocks that are compiled one by one in a model that runs eagerly, predicted and measured."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import velora_fx
from tests.helpers import zoo
from tests.helpers.peaks import assert_near, measured_peak, plans_for, predict
from tests.helpers.toys import Stack, rows, stack, without_dropout
from velora_fx.analyse import Actions
from velora_fx.runtime import install


def batch() -> dict[str, Tensor]:
    return {"x": rows(32, 64)}


def test_the_peak_is_the_allocators_untouched_and_compressed() -> None:
    model = without_dropout(stack(num_blocks=4))
    analysis = predict(model, batch(), compiled=True).analysis
    sizes = {candidate.key: candidate.sizes[-1] for candidate in analysis.candidates}
    compressed = copy.deepcopy(model)
    install(compressed, plans_for(analysis, sizes), seed=0)
    for one, actions in ((model, Actions()), (compressed, Actions(sizes))):
        peak = analysis.peak(actions, by_blocks=True)
        assert_near(peak.peak_bytes, measured_peak(one, batch(), "blocks"), "blocks")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3"])  # all blocks alike, and blocks of two kinds
def test_blocks_that_fill_a_cache_return_keys_and_values_that_live_as_long_as_it(name: str) -> None:
    case = next(case for case in zoo.ZOO if case.name == name)
    model, inputs = case.build(), case.batch(16, 32)
    analysis = predict(model, inputs, compiled=True, loss_fn=zoo.loss_of).analysis
    assert_near(
        analysis.peak(Actions(), by_blocks=True).peak_bytes,
        measured_peak(model, inputs, "blocks", zoo.loss_of),
        "blocks",
    )


class Checkpointing(Stack):
    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x).square().mean()  # type: ignore[no-any-return]


@pytest.mark.slow
def test_compiled_blocks_inside_of_checkpoints_run_twice() -> None:
    torch.manual_seed(0)
    model = without_dropout(Checkpointing(3))
    analysis = predict(model, batch(), compiled=True).analysis
    peak = analysis.peak(Actions(), by_blocks=True)
    assert_near(peak.peak_bytes, measured_peak(model, batch(), "blocks"), "blocks")


def note_of(plan: velora_fx.Plan) -> str:
    return next((note for note in plan.notes if "block.compile()" in note), "")


@pytest.mark.slow
def test_the_plan_says_for_which_way_of_compiling_its_figures_are_where_they_differ() -> None:
    model = without_dropout(stack(num_blocks=4))
    plan = velora_fx.plan(model, None, batch(), compiled=True, optimizer="sgd")
    assert not note_of(plan)  # alike within one hundredth
    torch.manual_seed(0)
    checkpointing = without_dropout(Checkpointing(3))
    plan = velora_fx.plan(checkpointing, None, batch(), compiled=True, optimizer="sgd")
    assert note_of(plan).startswith("all figures are for torch.compile(model); with each block compiled by itself")


def test_a_model_in_which_nothing_repeats_and_an_eager_plan_have_no_such_note() -> None:
    torch.manual_seed(0)
    single = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 4))
    for target, model in (("inductor", single), ("eager", without_dropout(stack()))):
        name = "x" if target == "eager" else "input"
        plan = velora_fx.plan(model, None, {name: rows(32, 64)}, compiled=target == "inductor", optimizer="sgd")
        assert not note_of(plan)
