"""The optimizer of the simulated step: any that runs without values, made anew or copied, and never the real one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

import velora_fx
from tests.helpers.toys import Elementwise, Of

X = torch.randn(2, 4)


def toy() -> Of:
    return Of(lambda m, x: m.linear(x).square().mean(), linear=nn.Linear(4, 4))


MakeOptimizer = Callable[[nn.Module], Any]


class Warm(Elementwise):
    """Has an argument without a default, which is no option of a parameter group, and one number a weight as state."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, warm: int) -> None:
        super().__init__(params, lr)
        self.warm = warm

    def update(self, p: Any, group: dict[str, Any]) -> None:
        mean = self.state[p].setdefault("mean", torch.zeros_like(p)).add_(p.grad, alpha=1 / self.warm)
        p.sub_(mean, alpha=group["lr"])


UNPLANNABLE: dict[str, MakeOptimizer] = {
    "LBFGS": lambda model: torch.optim.LBFGS,
    "LBFGS instance": lambda model: torch.optim.LBFGS(model.parameters()),
    "Adafactor": lambda model: torch.optim.Adafactor,
    "Adafactor instance": lambda model: torch.optim.Adafactor(model.parameters()),
}


@pytest.mark.parametrize("name", UNPLANNABLE)
def test_an_optimizer_whose_step_needs_values_is_refused_by_name(name: str) -> None:
    model = toy()
    with pytest.raises(ValueError, match=name.split()[0]):
        velora_fx.plan(model, 1, X, optimizer=UNPLANNABLE[name](model))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_optimizer_of_a_class_with_a_required_argument_is_planned_for() -> None:
    model = toy()
    optimizer = Warm(model.parameters(), 0.1, warm=3)
    plan = velora_fx.plan(model, 1, X, optimizer=optimizer)
    assert plan.optimizer == "Warm"
    assert plan.baseline.breakdown["optimizer"] == sum(p.numel() * 4 for p in model.parameters())
    assert not optimizer.state


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"fused": True}], ids=str)
def test_a_rate_that_is_a_tensor_is_planned_for_as_a_number_is(options: dict[str, Any]) -> None:
    model = toy()
    optimizers = [torch.optim.Adam(model.parameters(), lr=rate, **options) for rate in (1e-3, torch.tensor(1e-3))]
    number, tensor = (velora_fx.plan(model, 1, X, optimizer=o).baseline.breakdown["optimizer"] for o in optimizers)
    assert number == tensor > 2 * sum(p.numel() * 4 for p in model.parameters())


def test_a_class_that_cannot_be_made_from_parameters_alone_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="Warm"):
        velora_fx.plan(toy(), 1, X, optimizer=Warm)


OPTIMIZERS: dict[str, MakeOptimizer] = {
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1),
    "required argument": lambda model: Warm(model.parameters(), 0.1, warm=3),
}
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "none": lambda optimizer: None,
    "step": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2),
    "lambda": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch),
}


@pytest.mark.parametrize("scheduled", SCHEDULERS)
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_real_optimizer_its_scheduler_and_the_weights_are_left_alone(name: str, used: bool, scheduled: str) -> None:
    model = toy()
    optimizer = OPTIMIZERS[name](model)
    scheduler = SCHEDULERS[scheduled](optimizer)
    if used:
        model(X).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = copy.deepcopy((optimizer.state_dict(), model.state_dict(), scheduler and scheduler.state_dict()))
    plan = velora_fx.plan(model, 1, X, optimizer=optimizer)
    assert plan.baseline.breakdown["optimizer"] >= sum(p.numel() * 4 for p in model.parameters())
    after = optimizer.state_dict(), model.state_dict(), scheduler and scheduler.state_dict()
    torch.testing.assert_close(after[:2], before[:2], rtol=0, atol=0)
    assert str(after[2]) == str(before[2])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert getattr(optimizer, "_opt_called", False) == (used and scheduler is not None)


class Matching(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y[int(y.detach().cpu().numpy().argmax()) % len(y)].sum()


def test_a_loss_that_takes_its_values_to_numpy_is_refused_with_the_place_and_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"\.numpy\(\).*test_step\.py.*without labels, and loss_fn"):
        velora_fx.plan(Matching(4, 4), None, X)


def test_a_loss_of_several_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one number, got a tensor of shape \(4,\)"):
        velora_fx.plan(toy(), None, X, loss_fn=lambda loss: loss.expand(4))
