"""The exact rivals of a plan, measured under the real compiler."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._functorch.config
from torch import nn

import velora_fx
from tests.helpers.allocator import peak_of
from tests.helpers.gradients import assert_same_gradients, tightest
from tests.helpers.peaks import tensor_bytes
from tests.helpers.toys import rows, stack, without_dropout

BATCH = (rows(64, 64, 64),)


def model_without_dropout(num_blocks: int = 3) -> nn.Module:
    return without_dropout(stack(width=64, num_blocks=num_blocks))  # type: ignore[no-any-return]


def compiled_peak(model: nn.Module, by_blocks: bool) -> int:
    """Peak bytes of a compiled step without an optimizer: the whole model's, or one in which each block is compiled."""
    torch._dynamo.reset()
    if by_blocks:
        for block in model.blocks:
            block.compile(fullgraph=True)
    run = model if by_blocks else torch.compile(model, fullgraph=True)

    def step() -> None:
        run(*BATCH).backward()

    step()
    model.zero_grad()
    return tensor_bytes([*model.parameters(), *BATCH]) + peak_of(step)


@pytest.mark.slow
def test_the_compilers_own_recompute_reaches_what_the_plan_says() -> None:
    model = model_without_dropout()
    tight = tightest(model, BATCH, compiled=True, optimizer="none")
    plan = velora_fx.plan(
        model, (tight.baseline.peak_bytes - 1) / 2**30, BATCH, compiled=True, optimizer="none", method="compress"
    )
    assert plan.compressed and plan.exact is not None and plan.exact.means == "compiler"
    with torch._functorch.config.patch(ban_recompute_materialized_backward=False):
        measured = compiled_peak(model, by_blocks=False)
    assert abs(plan.exact.peak_bytes - measured) <= 0.03 * measured
    assert "ban_recompute_materialized_backward=False" in str(plan)


@pytest.mark.slow
def test_compiled_by_blocks_an_exact_plan_fits_and_its_gradients_are_the_untouched_ones() -> None:
    model = model_without_dropout(num_blocks=6)  # no more than four are compiled as a whole
    reference = copy.deepcopy(model)
    options = {"compiled": True, "optimizer": "none", "method": "exact"}
    with pytest.raises(velora_fx.BudgetError) as raised:
        velora_fx.plan(model, 1e-9, BATCH, **options)
    tight = raised.value.plan
    velora_fx.apply(model, tight, BATCH)
    measured = compiled_peak(model, by_blocks=True)
    assert abs(tight.planned.peak_bytes - measured) <= 0.03 * measured
    assert any("compiled one by one" in note for note in tight.notes)
    reference(*BATCH).backward()
    assert_same_gradients(model, reference)
