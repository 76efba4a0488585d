"""Which optimizers are let step factored gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from tests.helpers.factored import carriers, pair
from tests.helpers.toys import Elementwise


class Lion(Elementwise):
    """The sign of a moving average (arXiv 2302.06675), as third parties write it."""

    def update(self, p: Any, group: dict[str, Any]) -> None:
        average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(group["lr"] * (0.9 * average + 0.1 * p.grad).sign())
        average.lerp_(p.grad, 0.01)


class Lamb(Elementwise):
    """Scales each step by the norm of its weight (arXiv 1904.00962)."""

    def update(self, p: Any, group: dict[str, Any]) -> None:
        p.sub_(group["lr"] * (p.norm() + 1) * p.grad)


class OneSided(Elementwise):
    """Elementwise, but not alike for both signs."""

    def update(self, p: Any, group: dict[str, Any]) -> None:
        p.sub_(group["lr"] * p.grad.relu())


class Unknown(torch.optim.SGD):
    """A step that cannot be tried apart from its data."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise LookupError("no batch")


Make = Callable[[Any], torch.optim.Optimizer]
COUPLED: dict[str, Make] = {
    name: partial(getattr(torch.optim, name), weight_decay=0.1)
    for name in ("Adam", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad")
} | {"SGD": partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1)}
MIXING = (torch.optim.Adafactor, Lamb, OneSided, torch.optim.ASGD)


def assert_refused(make: Make, match: str, **step: Any) -> None:
    """The first step raises, and neither weights nor carriers nor the optimizer's state change."""
    model, _ = pair("stack").copies()
    optimizer = make(model.parameters())
    model(**pair("stack").batch(0)).backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    state = {id(p): dict(values) for p, values in optimizer.state.items()}
    with pytest.raises(RuntimeError, match=match):
        optimizer.step(**step)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert (parameter.grad is None) == (name not in gradients)
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name])
    assert state == {id(p): dict(values) for p, values in optimizer.state.items()}


@pytest.mark.parametrize("name", COUPLED)
def test_weight_decay_in_the_gradient_is_refused_and_the_way_out_named(name):
    assert_refused(COUPLED[name], rf"{name} adds weight_decay=0.1 to the gradient.*decoupled.*gradients='dense'")


@pytest.mark.parametrize("make", MIXING, ids=lambda make: make.__name__)
def test_an_optimizer_that_mixes_entries_or_signs_is_refused(make):
    assert_refused(make, rf"{make.__name__} is not exact with factored gradients.*AdamW.*gradients='dense'")


def test_muon_which_orthogonalises_matrices_is_refused():
    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Muon([p for p in parameters if p.dim() == 2 and p.requires_grad])

    assert_refused(make, r"Muon .*gradients='dense'")


def test_lbfgs_which_mixes_all_entries_is_refused():
    assert_refused(torch.optim.LBFGS, r"LBFGS .*gradients='dense'", closure=lambda: torch.tensor(0.0))


def test_an_optimizer_that_cannot_be_tried_is_refused_with_its_own_error():
    assert_refused(partial(Unknown, lr=0.1), r"Unknown .* could not be tried \(LookupError: 'no batch'\)|LookupError")


@pytest.mark.parametrize(
    "make",
    [
        partial(Lion, weight_decay=0.0),
        partial(Lion, weight_decay=0.1),
        partial(torch.optim.SGD, lr=0.1, weight_decay=0.1),  # which decays as if decoupled
    ],
)
def test_an_unknown_optimizer_that_takes_signs_and_plain_sgd_are_exact(make):
    models = pair("stack").copies()
    for model in models:
        optimizer = make(model.parameters())
        for number in range(5):
            model(**pair("stack").batch(number)).backward()
            optimizer.step()
            optimizer.zero_grad()
    ours, reference = (model.state_dict() for model in models)
    assert carriers(models[0])
    for name, value in ours.items():
        torch.testing.assert_close(value, reference[name], rtol=1e-12, atol=1e-12)


def test_decay_that_is_switched_on_later_is_looked_at_again():
    model, _ = pair("stack").copies()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(**pair("stack").batch(0)).backward()
    optimizer.step()
    optimizer.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(RuntimeError, match="adds weight_decay"):
        optimizer.step()


def test_a_group_without_decay_may_stand_beside_one_with_it():
    model, _ = pair("stack").copies()
    others = [p for name, p in model.named_parameters() if not name.endswith("_carrier")]
    groups = [{"params": list(carriers(model).values())}, {"params": others, "weight_decay": 0.1}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    model(**pair("stack").batch(0)).backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    weights = [name.removesuffix("_carrier") for name in carriers(model)]
    assert all(not torch.equal(model.get_parameter(name), before[name]) for name in weights)
