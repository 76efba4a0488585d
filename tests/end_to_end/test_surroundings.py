"""What the caller has switched on around planning changes no plan, or the error says that it does."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import velora_fx
from tests.helpers.gradients import tightest
from tests.helpers.toys import rows, stack

SURROUNDINGS = {
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "a device": lambda: torch.device("cpu"),
    "saved-tensor hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
}


def switched_on() -> tuple[bool, ...]:
    return torch.is_anomaly_enabled(), torch.is_inference_mode_enabled(), torch.is_grad_enabled()


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_a_plan_is_the_same_whatever_is_on_and_that_stays_on(name: str) -> None:
    alone = tightest(stack(), (rows(),), method="auto")
    with SURROUNDINGS[name]():
        before = switched_on()
        inside = tightest(stack(), (rows(),), method="auto")
        assert switched_on() == before
    assert (inside.decisions, inside.recomputed) == (alone.decisions, alone.recomputed)
    assert inside.planned.peak_bytes == alone.planned.peak_bytes


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_a_model_is_optimised_and_trained_under_anomaly_detection() -> None:
    model = stack()
    with torch.autograd.set_detect_anomaly(True):
        velora_fx.optimize(model, 1, (rows(),))
        model(rows()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_an_error_for_a_model_about_which_nothing_can_be_done_says_why() -> None:
    with FlopCounterMode(display=False), pytest.raises(velora_fx.BudgetError) as caught:
        velora_fx.plan(stack(), 1e-6, (rows(),))
    assert "Nothing can be compressed or recomputed" in str(caught.value)
    assert "there are hooks on all modules" in str(caught.value)
    with pytest.raises(velora_fx.BudgetError) as caught:
        velora_fx.plan(stack(), 1e-6, (rows(),))
    assert "Nothing can be compressed" not in str(caught.value)
