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
from tests.helpers.gradients import assert_same_gradients
from tests.helpers.peaks import assert_near, measured_peak, plans_for, predict
from tests.helpers.toys import Stack, rows, stack, without_dropout
from velora_fx.analyse import Actions
from velora_fx.runtime import Notices, install


def batch() -> dict[str, Tensor]:
    return {"x": rows(32, 64)}


def test_the_peak_is_the_allocators_untouched_and_compressed() -> None:
    model = without_dropout(stack(num_blocks=4))
    analysis = predict(model, batch(), compiled="blocks").analysis
    sizes = {candidate.key: candidate.sizes[-1] for candidate in analysis.candidates}
    compressed = copy.deepcopy(model)
    install(compressed, plans_for(analysis, sizes), 0, Notices(None))
    for one, actions in ((model, Actions()), (compressed, Actions(sizes))):
        peak = analysis.peak(actions)
        assert_near(peak.peak_bytes, measured_peak(one, batch(), "blocks"), "blocks")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3"])  # all blocks alike, and blocks of two kinds
def test_blocks_that_fill_a_cache_return_keys_and_values_that_live_as_long_as_it(name: str) -> None:
    case = next(case for case in zoo.ZOO if case.name == name)
    model, inputs = case.build(), case.batch(16, 32)
    analysis = predict(model, inputs, compiled="blocks", loss_fn=zoo.loss_of).analysis
    assert_near(
        analysis.peak(Actions()).peak_bytes,
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
    analysis = predict(model, batch(), compiled="blocks").analysis
    peak = analysis.peak(Actions())
    assert_near(peak.peak_bytes, measured_peak(model, batch(), "blocks"), "blocks")


@pytest.mark.slow
def test_an_exact_plan_fits_and_its_gradients_are_the_untouched_ones() -> None:
    model = without_dropout(stack(num_blocks=6))
    reference = copy.deepcopy(model)
    with pytest.raises(velora_fx.BudgetError) as raised:
        velora_fx.plan(model, 1e-9, batch(), compiled="blocks", optimizer="sgd", method="exact")
    tight = raised.value.plan
    velora_fx.apply(model, tight, batch())
    assert_near(tight.planned.peak_bytes, measured_peak(model, batch(), "blocks"), "blocks")
    for one in (model, reference):
        one.zero_grad()
        one(**batch()).backward()
    assert_same_gradients(model, reference)


def test_a_model_is_planned_for_compiled_blocks_where_its_blocks_are_compiled() -> None:
    model = without_dropout(stack(num_blocks=2))
    for block in model.blocks:
        block.compile()
    assert velora_fx.plan(model, None, batch()).compiled == "blocks"
    model.compile()
    assert velora_fx.plan(model, None, batch()).compiled is True


def test_a_model_without_repeated_blocks_cannot_be_planned_for_compiled_ones() -> None:
    single = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 4))
    with pytest.raises(ValueError, match=r"compiled='blocks' .* no repeated blocks: use compiled=True"):
        velora_fx.plan(single, None, (rows(32, 64),), compiled="blocks", optimizer="sgd")
