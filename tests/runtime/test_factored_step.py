"""What happens around the steps of an optimizer that holds carriers."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

import velora_fx
from tests.helpers.factored import assert_same_weights, assert_trained_alike, carriers, pair, train


@pytest.fixture
def model() -> nn.Module:
    return pair("stack").copies()[0]


def test_an_optimizer_made_before_is_refused_at_its_first_step_with_the_line_to_move():
    both = pair("stack")
    model = velora_fx.restore(copy.deepcopy(both.factored))
    optimizer = torch.optim.AdamW(model.parameters())
    velora_fx.apply(model, velora_fx.plan_of(both.factored), both.batch(0))
    model(**both.batch(0)).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"AdamW holds .*up.weight but not .*up.weight_carrier.*after velora_fx.opt"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_optimizers_of_other_parameters_are_left_alone(model):
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    other = nn.Linear(3, 3)
    for optimizer in (torch.optim.Adafactor(norms), torch.optim.LBFGS(other.parameters())):
        model(**pair("stack").batch(0)).backward()
        optimizer.step(lambda: torch.tensor(0.0))


def test_two_optimizers_may_share_the_weights():
    def train_one(model: nn.Module) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        first = [p for name, p in trained.items() if "up" in name]
        rest = [p for name, p in trained.items() if "up" not in name]
        optimizers = torch.optim.AdamW(first), torch.optim.SGD(rest, lr=0.1)
        for number in range(3):
            model(**pair("stack").batch(number)).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    assert_trained_alike(train_one)


def test_a_closure_may_make_the_gradients():
    assert_trained_alike(lambda model: train(model, torch.optim.AdamW(model.parameters()), closure=True))


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_grad_scaler_skips_changes_nothing_and_the_others_are_exact(fused):
    def train_one(model: nn.Module) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.5, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for number in range(4):
            optimizer.zero_grad()
            loss = scaler.scale(model(**pair("stack").batch(number)))
            (loss * float("inf") if number == 2 else loss).backward()
            before = copy.deepcopy(model.state_dict())
            scaler.step(optimizer)
            scaler.update()
            changed = [not torch.equal(value, before[name]) for name, value in model.state_dict().items()]
            assert any(changed) == (number != 2)

    assert_trained_alike(train_one)


class Outer(torch.optim.Optimizer):
    """Steps another optimizer of the same parameters, as averaging and sharding ones do."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})
        self.inner = torch.optim.AdamW(self.param_groups)

    def step(self, closure: Any = None) -> Any:
        return self.inner.step()


def test_an_optimizer_around_another_one_is_refused_and_neither_steps(model):
    optimizer = Outer(p for p in model.parameters() if p.requires_grad)
    model(**pair("stack").batch(0)).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"Outer .*could not be tried .*AdamW of its own"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not optimizer.inner.state and not any(carrier.any() for carrier in carriers(model).values())


def test_a_weight_whose_carrier_has_no_gradient_is_left_alone(model):
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.5)
    name, carrier = next(iter(carriers(model).items()))
    before = model.get_parameter(name.removesuffix("_carrier")).detach().clone()
    model(**pair("stack").batch(0)).backward()
    carrier.grad = None
    optimizer.step()
    assert torch.equal(model.get_parameter(name.removesuffix("_carrier")), before)


def test_a_gradient_of_the_weight_itself_is_refused(model):
    optimizer = torch.optim.AdamW(model.parameters())
    weight = model.get_parameter(next(iter(carriers(model))).removesuffix("_carrier"))
    model(**pair("stack").batch(0)).backward()
    weight.requires_grad_()
    weight.grad = torch.ones_like(weight)
    with pytest.raises(RuntimeError, match="has a gradient of its own"):
        optimizer.step()


def hooks() -> int:
    return len(_global_optimizer_pre_hooks) + len(_global_optimizer_post_hooks)


def test_hooks_on_optimizers_are_there_as_long_as_the_model_is():
    pair("stack")  # it stays
    gc.collect()
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    for _ in range(hooks()):
        other.step()  # hooks of models that are gone leave
    before = hooks()
    model, _ = pair("stack").copies()
    assert hooks() == before + 2
    velora_fx.restore(model)  # carriers that are still held would be refused
    other.step()
    assert hooks() == before
    model, _ = pair("stack").copies()
    del model
    gc.collect()
    other.step()
    assert hooks() == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_trains_by_itself(copied):
    ours, reference = pair("stack").copies()
    twin = copied(ours)
    untouched = copy.deepcopy(ours.state_dict())
    for model in (twin, reference):
        train(model, torch.optim.AdamW(model.parameters()), 1)
    assert_same_weights(twin, reference, pair("stack").dense)
    assert all(torch.equal(value, untouched[name]) for name, value in ours.state_dict().items())
