"""What gradients and optimizer state take in a simulated step, and what of it factored gradients free."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import velora_fx
from tests.helpers.toys import rows, stack
from velora_fx.analyse import analyse
from velora_fx.choose.updates import find_freed, updates_of
from velora_fx.options import Options


def analysed(optimizer: str):
    options = Options(optimizer=optimizer, gradients="factored")
    return analyse(stack(), (rows(),), {}, options, torch.device("cpu"), lambda step: None)


def test_each_parameter_has_a_gradient_and_two_moments_of_its_size():
    updates = updates_of(analysed("adamw").untouched)
    for name, parameter in stack().named_parameters():
        update = updates[name]
        assert update.parameter_bytes == sum(update.gradient.values()) == parameter.nbytes
        assert sum(update.state.values()) == 2 * parameter.nbytes + 4  # and a counter of steps
        assert update.num_bytes == 3 * parameter.nbytes + 4


def test_freed_is_all_but_one_part_in_m_of_state_and_gradient_less_the_carriers():
    analysis = analysed("adamw")
    candidates = analysis.candidates
    freed = find_freed(analysis.findings, candidates, [candidate.sizes for candidate in candidates])
    end = len(analysis.findings.timeline.deltas)
    for index, candidate in enumerate(candidates):
        num_bytes = 4 * candidate.num_weights
        state, gradient, *scratch = (one for one in freed if one.item.tied_to == (index,))  # each of one weight here
        for size, from_state, from_gradient in zip(
            candidate.sizes, state.item.savings, gradient.item.savings, strict=True
        ):
            assert abs(from_state - (2 * num_bytes - 3 * num_bytes / size)) <= 5
            assert abs(from_gradient - (num_bytes - num_bytes / size)) <= 1
        assert (state.first, state.end) == (0, end) and 0 < gradient.first < gradient.end == end
        assert {one.item.savings for one in scratch} == {gradient.item.savings}
        assert all(gradient.first < one.first < one.end < end for one in scratch)


def test_without_an_optimizer_only_gradients_are_freed():
    analysis = analysed("none")
    sizes = [candidate.sizes for candidate in analysis.candidates]
    freed = find_freed(analysis.findings, analysis.candidates, sizes)
    assert all((one.first > 0) == (one.item.savings[-1] > 0) for one in freed)


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.gelu(self.used(x))
        return self.idle(h), h


def test_an_optimizer_holds_nothing_for_weights_that_no_loss_depends_on() -> None:
    torch.manual_seed(0)
    model = Idle().train()
    plan = velora_fx.plan(model, None, (torch.randn(8, 32, 64),), loss_fn=lambda output: output[1].square().mean())
    moments = 2 * sum(parameter.numel() * 4 for parameter in model.used.parameters())
    steps = 4 * len(list(model.used.parameters()))
    assert plan.baseline.breakdown["optimizer"] == moments + steps
