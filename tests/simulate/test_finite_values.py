"""A check whether values are finite is taken to find them so in planning, and is made in training."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import velora_fx
from tests.helpers.gradients import compressed_weights, tightest
from tests.helpers.peaks import measured_peak, predict
from tests.helpers.toys import Of
from velora_fx.simulate import FiniteValues, fake_copy, fake_mode, kernels_of

CPU = torch.device("cpu")
WIDTH = 64


def asserted(h: Tensor) -> bool:
    torch._assert(torch.isfinite(h).all(), "not finite")
    return False


CHECKS: dict[str, Callable[[Tensor], object]] = {
    "not isfinite.all": lambda h: not torch.isfinite(h).all(),
    "isinf.any or isnan.any": lambda h: torch.isinf(h).any() or torch.isnan(h).any(),
    "isinf | isnan": lambda h: (torch.isinf(h) | torch.isnan(h)).any(),
    "method and item": lambda h: not h.isfinite().all().item(),
    "not equal to itself": lambda h: (h != h).any(),
    "inverted": lambda h: (~torch.isfinite(h)).any(),
    "counted": lambda h: torch.isnan(h).sum() > 0,
    "one number": lambda h: torch.isnan(h.sum()),
    "asserted": asserted,
}


def checked_loss(m: Of, x: Tensor) -> Tensor:
    loss = m.layers(m.first(x)).square().mean()
    return loss.new_zeros(()) if torch.isnan(loss) else loss


def checked(check: str) -> Of:
    def block(m: Of, x: Tensor) -> Tensor:
        h = x + m.down(torch.nn.functional.gelu(m.up(x)))
        return torch.clamp(h, -1, 1) if CHECKS[check](h) else h

    torch.manual_seed(0)
    first = nn.Linear(WIDTH, WIDTH)
    blocks = [Of(block, up=nn.Linear(WIDTH, 4 * WIDTH), down=nn.Linear(4 * WIDTH, WIDTH)) for _ in range(3)]
    return Of(checked_loss, first=first, layers=nn.Sequential(*blocks))


def batch(rows: int = 256) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, WIDTH)}


@pytest.mark.parametrize("check", CHECKS)
def test_a_step_with_checks_is_predicted_to_the_byte(check):
    model = checked(check)
    predicted = predict(model, batch())
    assert predicted.untouched_bytes == measured_peak(model, batch())
    assert predicted.compressed_bytes == measured_peak(predicted.compressed, batch()) < predicted.untouched_bytes


def test_a_check_is_made_in_training():
    """Overflow in one row: the untouched model clamps, and so does the optimised one, whose inputs are compressed."""
    model = checked("not isfinite.all")
    optimised = copy.deepcopy(model)
    velora_fx.apply(optimised, tightest(model, batch()), batch())
    assert compressed_weights(optimised)
    fine = batch()
    overflowing = {"x": fine["x"].index_fill(0, torch.tensor([0]), 3e38)}
    for values in (fine, overflowing):
        torch.testing.assert_close(optimised(**values), model(**values), rtol=0, atol=0)
    assert model(**overflowing) != model(**fine)


def test_a_block_with_a_check_is_taken_apart_and_its_graph_is_not_printed(capfd):
    plan = tightest(checked("not isfinite.all"), batch())
    printed = capfd.readouterr()
    assert "def forward" not in printed.out + printed.err
    assert {name for item in plan.compressed for name in item.consumers} == {
        *(f"layers.{number}.{name}" for number in range(3) for name in ("up", "down"))
    }
    assert any("branches on the values of tensors" in note for note in plan.notes)


@pytest.mark.parametrize("target", ["eager", "inductor"])
def test_the_report_says_where_values_are_taken_to_be_finite(target):
    plan = velora_fx.plan(checked("isinf.any or isnan.any"), None, batch(), compiled=target == "inductor")
    (note,) = (note for note in plan.notes if "finite" in note)
    assert f"{__file__}:" in note and "torch.isnan(loss)" in note
    assert ("torch.compile" in note) == (target == "inductor")


def test_a_model_without_a_check_has_no_note_of_one():
    assert not any("finite" in note for note in velora_fx.plan(nn.Linear(8, 8), None, torch.randn(4, 8)).notes)


def masked(m: Of, x: Tensor, mask: Tensor) -> Tensor:
    """Does something else where the mask, a real input, has an infinity in it."""
    return (m.first if torch.isinf(mask).any() else m.second)(x).square().mean()


@pytest.mark.parametrize(("value", "unused"), [(float("-inf"), "second"), (0.0, "first")])
def test_values_that_planning_has_are_looked_at(value, unused):
    model = Of(masked, first=nn.Linear(8, 8), second=nn.Linear(8, 8))
    plan = velora_fx.plan(model, None, (torch.randn(4, 8), torch.full((4, 8), value)))
    assert {item.module for item in plan.skipped if "not called" in item.reason} == {unused}
    assert not any("finite" in note for note in plan.notes)


def test_a_branch_on_anything_else_is_refused_with_its_place():
    class Limited(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            h = super().forward(x)
            return h.clamp(-1, 1) if h.abs().max() > 100 else h

    with pytest.raises(ValueError, match=r"asks for some .*test_finite_values.py:\d+: .*h.abs\(\).max\(\) > 100"):
        velora_fx.plan(Limited(8, 8), None, torch.randn(4, 8))


def test_an_answer_that_was_written_over_is_not_known():
    (h,) = fake_copy([torch.randn(4)], fake_mode())
    with kernels_of(CPU), FiniteValues():
        found = torch.isnan(h)
        assert not found.any()
        found |= h > 0
        with pytest.raises(Exception, match="local_scalar_dense"):
            bool(found.any())
