"""What there is to choose from, against simulations and the real allocator."""

from __future__ import annotations

import copy
import random
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.peaks import assert_near, measured_peak, plans_for
from tests.helpers.toys import rows, stack, without_dropout
from velora_fx.analyse import Actions, Analysis, analyse
from velora_fx.choose.problem import Problem
from velora_fx.choose.search import Search
from velora_fx.options import Options
from velora_fx.runtime import Notices, install


def analysis_of(model: nn.Module, batch: dict[str, Tensor], **options: object) -> Analysis:
    wanted = Options(loss_fn=lambda output: output, **options)  # type: ignore[arg-type]
    return analyse(model, (), batch, wanted, torch.device("cpu"), lambda step: None)


def assert_expected(analysis: Analysis) -> None:
    """The solver takes some choices to be what they are in a simulation."""
    problem = Problem(analysis, compresses=True, recomputes=False)
    choices, drawn = random.Random(0), set()
    for _ in range(5):
        levels = [choices.randint(0, len(candidate.sizes)) for candidate in problem.candidates]
        tied = [levels[item.tied_to[0]] if item.tied_to else 0 for item in problem.items[len(levels) :]]
        expected = max(moment.bytes_at(problem.items, [*levels, *tied]) for moment in problem.program.moments)
        peak = problem.analysis.peak(problem.actions([*levels, *tied])).tensor_bytes
        assert expected == pytest.approx(peak, rel=1e-4)
        drawn.add(peak)
    assert len(drawn) == 5 and analysis.baseline.tensor_bytes > max(drawn)


@pytest.mark.parametrize(("gradients", "optimizer"), [("dense", "sgd"), ("factored", "adamw")])
def test_what_the_solver_takes_a_choice_to_be_is_what_is_simulated(
    gradients: Literal["dense", "factored"], optimizer: str
) -> None:
    batch = {"x": rows(16, 32)}
    assert_expected(analysis_of(without_dropout(stack(num_blocks=3)), batch, gradients=gradients, optimizer=optimizer))


def test_so_it_is_where_the_peak_is_what_an_optimizer_makes_of_all_gradients_at_once() -> None:
    model = without_dropout(stack(num_blocks=3, width=128))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    analysis = analysis_of(model, {"x": rows(1, 2, 128)}, gradients="factored", optimizer=optimizer)
    assert analysis.baseline.moment == "optimizer step"
    assert_expected(analysis)


class Products(nn.Module):
    """Matrix products right after each other: their inputs cannot be made again without a product."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()  # type: ignore[no-any-return]


def compiled_search(model: nn.Module, batch: dict[str, Tensor]) -> Search:
    return Search(analysis_of(model, batch, compiled=True, optimizer="sgd"), compresses=True, recomputes=False)


@pytest.mark.slow
def test_compiled_code_makes_projections_again_so_that_the_smallest_sub_tokens_free_nearly_everything() -> None:
    model, batch = without_dropout(stack(num_blocks=4)), {"x": rows(64, 64)}
    search = compiled_search(model, batch)
    assert not search.problem.projections_are_kept
    peaks = [measured_peak(model, batch, "inductor")]
    for index in (0, -1):
        sizes = {candidate.key: candidate.sizes[index] for candidate in search.analysis.candidates}
        compressed = copy.deepcopy(model)
        install(compressed, plans_for(search.analysis, sizes), 0, Notices(None))
        peaks.append(measured_peak(compressed, batch, "inductor"))
        assert_near(search.analysis.peak(Actions(sizes)).peak_bytes, peaks[-1], "inductor")
    untouched, at_two, at_most = peaks
    assert untouched - at_two > 0.75 * (untouched - at_most)  # kept, they would free about half of it


def test_projections_of_what_only_a_product_makes_are_kept() -> None:
    batch = {"x": rows(64, 64, 64)}
    search = compiled_search(Products().train(), batch)
    assert search.problem.projections_are_kept
    assert min(search.tightest[0].sizes.values()) > 2
    compressed = Products().train()
    install(compressed, plans_for(search.analysis, search.tightest[0].sizes), 0, Notices(None))
    assert_near(search.tightest[1].peak_bytes, measured_peak(compressed, batch, "inductor"), "inductor")
