"""Carriers as parameters of a model: named, left out of state dicts, and taken away again."""

from __future__ import annotations

import copy
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import nn

import velora_fx
from tests.helpers.factored import carriers, pair, train
from tests.helpers.gradients import tightest
from tests.helpers.toys import Of, rows, stack


def test_each_compressed_weight_has_one_under_its_name_m_times_smaller_and_zero():
    model = pair("gpt2").factored
    found = carriers(model)
    assert {name.removesuffix("_carrier") for name in found} == {
        f"{name}.weight" for decision in velora_fx.plan_of(model).compressed for name in decision.consumers
    }
    sizes = {f"{name}.weight": d.sub_token_size for d in velora_fx.plan_of(model).compressed for name in d.consumers}
    for name, carrier in found.items():
        weight = model.get_parameter(name.removesuffix("_carrier"))
        assert not weight.requires_grad and carrier.requires_grad and not carrier.any()
        assert carrier.numel() * sizes[name.removesuffix("_carrier")] == weight.numel()
        assert carrier.dtype == weight.dtype and carrier.shape[1] == weight.shape[1]  # Conv1D: [D, O]


def test_state_dicts_are_those_of_the_plain_model_and_load_strictly():
    model, reference = pair("stack").copies()
    assert list(model.state_dict()) == list(reference.state_dict())
    changed = {name: value + 1 for name, value in reference.state_dict().items()}
    model.load_state_dict(changed, strict=True)
    model.load_state_dict(changed, strict=True, assign=True)
    assert all(torch.equal(value, changed[name]) for name, value in model.state_dict().items())
    assert not any(carrier.any() for carrier in carriers(model).values())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({name: value for name, value in changed.items() if "up.weight" not in name})
    plain = velora_fx.restore(copy.deepcopy(model))
    plain.load_state_dict(model.state_dict(), strict=True)


def test_restore_gives_back_plain_trainable_weights():
    model, _ = pair("stack").copies()
    velora_fx.restore(model)
    assert not carriers(model) and all(p.requires_grad for p in model.parameters())
    assert not any(m._state_dict_hooks or m._load_state_dict_pre_hooks for m in model.modules())
    model(**pair("stack").batch(0)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_second_optimize_plans_for_the_weights_and_gives_new_carriers():
    model, _ = pair("stack").copies()
    first = carriers(model)
    plan = tightest(model, pair("stack").batch(0), gradients="factored", sub_token_sizes=(4,))
    assert len(plan.compressed) == len(velora_fx.plan_of(model).compressed)
    velora_fx.apply(model, plan, pair("stack").batch(0))
    assert carriers(model).keys() == first.keys()
    assert all(carrier.numel() > first[name].numel() for name, carrier in carriers(model).items())
    velora_fx.apply(model, replace(plan, gradients="dense"), pair("stack").batch(0))
    assert not carriers(model) and all(p.requires_grad for p in model.parameters())


def test_a_failed_optimize_leaves_the_carriers_and_their_optimizer_as_they_were():
    model, reference = pair("stack").copies()
    optimizer = torch.optim.AdamW(model.parameters())
    before = carriers(model)
    with pytest.raises(velora_fx.BudgetError):
        velora_fx.optimize(model, 1e-6, pair("stack").batch(0))
    assert all(carrier is before[name] for name, carrier in carriers(model).items()) and before
    bad = replace(velora_fx.plan_of(model), seed=1)
    model.blocks[1].up.register_buffer("weight_carrier_2", torch.zeros(1))
    broken = mock.patch("velora_fx.session.install_checkpointing", side_effect=RuntimeError("no room"))
    with pytest.raises(RuntimeError, match="no room"), broken:
        velora_fx.apply(model, bad, pair("stack").batch(0))
    assert all(carrier is before[name] for name, carrier in carriers(model).items())
    train(model, optimizer, 1)
    train(reference, torch.optim.AdamW(reference.parameters()), 1)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-12, atol=1e-12)


def test_a_name_that_is_taken_is_refused_and_the_model_left_alone():
    model = stack()
    model.blocks[1].up.weight_carrier = "mine"
    plan = tightest(stack(), (rows(),), gradients="factored")
    with pytest.raises(ValueError, match=r"Linear .*blocks.1.up|has an attribute weight_carrier"):
        velora_fx.apply(model, plan, (rows(),))
    assert not carriers(model) and all(p.requires_grad for p in model.parameters())
    assert model.blocks[1].up.weight_carrier == "mine"


@pytest.mark.slow
def test_the_names_sort_into_the_groups_of_their_weights():
    model = pair("llama").factored
    decayed = [name for name, p in model.named_parameters() if p.requires_grad and "norm" not in name]
    assert {f"{name}_carrier" for name in decayed} >= set(carriers(model)) - set(decayed)
    assert set(carriers(model)) <= set(decayed)


def sharing(m: Of, x: torch.Tensor) -> torch.Tensor:
    """Two linears with one weight, one that takes half of a weight, and one whose weight is used twice."""
    x = m.b(torch.tanh(m.a(torch.tanh(x))))
    x = nn.functional.linear(torch.tanh(x), m.c.weight[:16]).repeat(1, 2)
    x = m.d(torch.sigmoid(m.d(torch.tanh(x)))) + m.d.weight.sum()
    return m.e(torch.tanh(x)).square().mean()


def test_weights_without_a_factor_of_their_own_stay_dense_and_the_plan_says_why():
    model = Of(sharing, **{name: nn.Linear(32, 32, bias=False) for name in "abcde"})
    model.b.weight = model.a.weight
    plan = tightest(model, (torch.randn(8, 32),), gradients="factored")
    assert [name for decision in plan.compressed for name in decision.consumers] == ["e"]
    reasons = {skipped.module.partition("#")[0]: skipped.reason for skipped in plan.skipped}
    assert "shared" in reasons["a"] and "part of its weight" in reasons["c"] and "part of its weight" in reasons["d"]
