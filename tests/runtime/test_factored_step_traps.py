"""What people do around an optimizer's step, and what must not happen in silence then."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import nn

import velora_fx
from tests.helpers.factored import assert_same_weights, assert_trained_alike, carriers, loss_value, pair, train
from tests.helpers.gradients import tightest
from tests.helpers.toys import Elementwise, Of, rows
from velora_fx.capture import carriers_of


class Sub(torch.optim.AdamW):
    """A step that calls that of its base class, which PyTorch hooks too once it was made."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.fixture
def model() -> nn.Module:
    return pair("stack").copies()[0]


@pytest.mark.parametrize("closure", [False, True])
def test_a_step_that_calls_its_base_class_is_folded_once(closure):
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    assert_trained_alike(lambda model: train(model, Sub(model.parameters(), lr=1e-2, eps=1e-3), closure=closure))


@pytest.mark.parametrize("to_none", [True, False])
def test_a_hook_after_the_step_may_clear_the_gradients(to_none):
    def train_one(model: nn.Module) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad(set_to_none=to_none))
        train(model, optimizer)

    assert_trained_alike(train_one)


def test_a_hook_after_the_step_may_change_the_rate():
    def train_one(model: nn.Module) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        optimizer.register_step_post_hook(lambda *_: schedule.step())
        train(model, optimizer)

    assert_trained_alike(train_one)


def test_a_step_that_failed_may_be_taken_again():
    def train_one(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        loss_value(model(**pair("stack").batch(0))).backward()

        def fail(*_: Any) -> None:
            raise MemoryError

        handle = optimizer.register_step_pre_hook(fail)
        with pytest.raises(MemoryError):
            optimizer.step()
        handle.remove()
        optimizer.step()
        train(model, optimizer)

    assert_trained_alike(train_one)


def test_a_part_of_an_optimised_model_and_its_copy_are_trained_without_the_rest():
    ours, reference = pair("stack").copies()
    block, twin, dense = ours.blocks[0], copy.deepcopy(ours.blocks[0]), reference.blocks[0]
    del ours
    gc.collect()
    for module in (block, twin, dense):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        for number in range(3):
            optimizer.zero_grad()
            module(rows().double() + number).square().mean().backward()
            optimizer.step()
    start = pair("stack").dense.blocks[0]
    for module in (block, twin):
        assert_same_weights(module, dense, start)


@pytest.mark.parametrize("again", [velora_fx.restore, lambda model: reoptimize(model)])
def test_an_optimizer_of_carriers_that_are_gone_is_refused(model, again):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    again(model)
    loss_value(model(**pair("stack").batch(0))).backward()
    with pytest.raises(RuntimeError, match="holds carriers that restore or another optimize has taken out"):
        optimizer.step()
    torch.optim.AdamW(model.parameters()).step()


def reoptimize(model: nn.Module) -> None:
    plan = tightest(model, pair("stack").batch(0), gradients="factored", sub_token_sizes=(4,))
    velora_fx.apply(model, plan, pair("stack").batch(0))


def test_after_to_empty_and_loading_the_weights_training_goes_on():
    def train_one(model: nn.Module) -> None:
        state = copy.deepcopy(model.state_dict())
        model.to_empty(device="cpu")
        for carrier in carriers(model).values():
            carrier.data.fill_(7.0)
        model.load_state_dict(state)
        train(model, torch.optim.AdamW(model.parameters()))

    assert_trained_alike(train_one)


def test_weights_assigned_to_a_model_on_meta_bring_their_carriers():
    def train_one(model: nn.Module) -> None:
        state = copy.deepcopy(model.state_dict())
        model.to("meta").load_state_dict(state, assign=True)
        train(model, torch.optim.AdamW(model.parameters()))

    assert_trained_alike(train_one)


def test_gradients_switched_on_for_all_parameters_are_switched_off_again_for_weights_with_carriers():
    def train_one(model: nn.Module) -> None:
        model.requires_grad_(False)
        model.requires_grad_(True)
        train(model, torch.optim.AdamW(model.parameters()))

    assert_trained_alike(train_one)


def test_gradients_of_training_before_are_dropped_with_the_weights_own():
    both = pair("stack")
    model = velora_fx.restore(copy.deepcopy(both.factored))
    loss_value(model(**both.batch(0))).backward()
    velora_fx.apply(model, velora_fx.plan_of(both.factored), both.batch(0))
    assert all(model.get_parameter(name.removesuffix("_carrier")).grad is None for name in carriers(model))


def test_a_weight_tied_afterwards_is_refused(model):
    model.blocks[1].up.weight = model.blocks[0].up.weight
    optimizer = torch.optim.AdamW(model.parameters())
    loss_value(model(**pair("stack").batch(0))).backward()
    with pytest.raises(RuntimeError, match=r"tied to another weight after velora_fx.optimize"):
        optimizer.step()


def test_a_module_put_in_the_place_of_another_is_an_error_of_its_model_alone(model):
    model.blocks[0].up = nn.Linear(32, 64).double()
    other = nn.Linear(3, 3)
    other(torch.ones(3)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match=r"up.weight_carrier is gone: restore the model|in a new way"):
        model(**pair("stack").batch(0))


def with_phases() -> Of:
    """A model with a parameter of its own that is called like a carrier."""
    return Of(
        lambda m, x: m.fc(x.tanh() * m.phase * m.phase_carrier).square().mean(),
        fc=nn.Linear(16, 16),
        phase=nn.Parameter(torch.ones(16), requires_grad=False),
        phase_carrier=nn.Parameter(torch.ones(16)),
    )


def test_a_parameter_of_the_model_that_is_called_like_a_carrier_stays_its_own():
    x = torch.randn(8, 16)
    for gradients in ("dense", "factored"):
        model = with_phases()
        plan = tightest(model, (x,), gradients=gradients)
        velora_fx.apply(model, plan, (x,))
        model(x).backward()
        assert model.phase_carrier.grad is not None and "phase_carrier" in model.state_dict()
        velora_fx.restore(model)
        assert isinstance(model.phase_carrier, nn.Parameter) and not model.phase.requires_grad


def test_a_model_inside_of_ddp_is_refused_before_anything_changes():
    wrapped = object.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    model = nn.Sequential(with_phases())
    plan = tightest(with_phases(), (torch.randn(8, 16),), gradients="factored")
    model.append(wrapped)
    with pytest.raises(ValueError, match="velora_fx comes before DDP, FSDP and DTensor, and 1 is wrapped already"):
        velora_fx.apply(model, plan, (torch.randn(8, 16),))
    assert not carriers_of(model)


class Counting(Elementwise):
    """Has a counter of its own that its rule takes."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=1e-2)
        self.t = torch.zeros(())

    def step(self, closure: Any = None) -> None:
        self.t += 1
        super().step()

    def update(self, p: Any, group: dict[str, Any]) -> None:
        p.sub_(group["lr"] * p.grad / self.t)


def test_trying_an_optimizer_leaves_its_own_attributes_alone(model):
    optimizer = Counting(model.parameters())
    train(model, optimizer, 1)
    assert optimizer.t == 1


def test_schedules_of_other_settings_are_not_tried_anew(model, monkeypatch):
    tried = []
    monkeypatch.setattr("velora_fx.runtime.factored_step.check_exactness", lambda *taken: tried.append(taken))
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=30)
    for _ in range(3):
        train(model, optimizer, 1)
        schedule.step()
    assert len(tried) == 1


def test_planning_with_an_optimizer_made_after_optimize_sees_its_carriers(model):
    optimizer = torch.optim.AdamW(model.parameters())
    plans = [tightest(model, pair("stack").batch(0), optimizer=o, gradients="factored") for o in (optimizer, "adamw")]
    assert plans[0].planned.peak_bytes == plans[1].planned.peak_bytes


def test_gradients_that_a_hook_after_the_step_makes_anew_are_not_divided(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: [c.grad.fill_(1.0) for c in carriers(model).values()])
    train(model, optimizer, 1)
    assert all((carrier.grad == 1).all() for carrier in carriers(model).values())


def test_groups_of_parameters_by_name_decay_and_step_as_their_weights_would():
    def train_one(model: nn.Module) -> None:
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, p in model.named_parameters():
            if p.requires_grad:
                groups["up" in name].append(p)
        decayed = [{"params": groups[True], "weight_decay": 0.5, "lr": 1e-2}, {"params": groups[False]}]
        train(model, torch.optim.AdamW(decayed, lr=1e-3, weight_decay=0.0))

    assert_trained_alike(train_one)
