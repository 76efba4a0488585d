"""Calls of blocks whose weights have factored gradients: trained by their graph, or refused, never left untrained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import velora_fx
from tests.helpers.factored import CASES, assert_same_weights, carriers, loss_value, pair
from tests.helpers.gradients import regions_of
from tests.helpers.toys import rows, stack


@pytest.fixture
def model() -> nn.Module:
    return pair("stack").copies()[0]


def one_step(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    loss_value(model(*args, **kwargs)).backward()
    optimizer.step()


def assert_trained(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Every weight with a carrier has changed."""
    state = model.state_dict()
    for weight in (name.removesuffix("_carrier") for name in carriers(model)):
        assert not torch.equal(state[weight], before[weight]), weight


@pytest.mark.parametrize(
    "args",
    [(rows(3, 5).double(),), (rows(1, 8).double(),), (rows().double(), torch.ones(4, 8, 1, dtype=torch.float64) / 2)],
)
def test_calls_of_other_sizes_and_with_a_mask_are_trained(args: tuple[Any, ...]) -> None:
    ours, reference = pair("stack").copies()
    for model in (ours, reference):
        one_step(model, *args)
    assert_same_weights(ours, reference, pair("stack").dense)


def test_a_model_in_eval_mode_is_trained_all_the_same() -> None:
    ours, before = pair("stack").copies()[0].eval(), pair("stack").copies()[0]
    one_step(ours, rows().double())
    assert_trained(ours, before.state_dict())
    with torch.no_grad():
        assert torch.equal(before.eval()(rows().double()), velora_fx.restore(before)(rows().double()))


def test_under_autocast_gradients_are_those_of_the_dense_plan() -> None:
    ours, reference = (model.float() for model in pair("stack").copies())
    for model in (ours, reference):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(rows())
        loss.backward()
    found = {(r.name, c.name): v for r in regions_of(ours) for c, v in r.directions.items()}
    directions = {f"{region}.{carrier}".lstrip("."): v for (region, carrier), v in found.items()}
    for name, carrier in carriers(ours).items():
        dense = reference.get_parameter(name.removesuffix("_carrier")).grad
        factored = (carrier.grad.unsqueeze(-1) * directions[name]).flatten(1)
        assert (factored - dense).norm() <= 0.01 * dense.norm()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_with_gradient_checkpointing_turned_on_afterwards_blocks_are_trained(use_reentrant: bool) -> None:
    ours, reference = pair("llama").copies()
    ours.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for model in (ours, reference):
        one_step(model, **pair("llama").batch(0))
    assert_same_weights(ours, reference, pair("llama").dense)


def refused(model: nn.Module, call: Callable[[], Any], reason: str) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=f"factored gradients, which its graph alone gives, .*{reason}"):
        call()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_hooks_on_inner_modules_are_refused_in_training_and_called_without_gradients(model: nn.Module) -> None:
    seen: list[int] = []
    model.blocks[0].up.register_forward_hook(lambda *_: seen.append(1))
    refused(model, lambda: model(rows().double()), "up in it has hooks")
    with torch.no_grad():
        model(rows().double())
    assert seen == [1]


def test_torch_func_is_refused(model: nn.Module) -> None:
    x = rows().double()
    refused(model, lambda: torch.func.grad(lambda x: model(x))(x), "inside of torch.func")


def test_a_call_that_cannot_be_captured_is_refused(model: nn.Module) -> None:
    class Cache:
        def update(self, h: torch.Tensor) -> torch.Tensor:
            return h

    refused(model, lambda: model(rows().double(), None, Cache()), "takes an argument of type Cache")


def test_too_many_kinds_of_calls_are_refused(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("velora_fx.runtime.region.MAX_GRAPHS", 1)
    refused(model, lambda: model(rows().double(), torch.ones(4, 8, 1, dtype=torch.float64)), "in a new way")


def test_after_to_bfloat16_the_model_is_still_trained() -> None:
    model = pair("stack").copies()[0].to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    one_step(model, rows().bfloat16())
    assert_trained(model, before)
    assert all(carrier.dtype == torch.bfloat16 and not carrier.any() for carrier in carriers(model).values())


def test_without_example_inputs_factored_gradients_are_refused() -> None:
    model = stack().double()
    with pytest.raises(ValueError, match="factored gradients need example_inputs"):
        velora_fx.optimize(model, 1, gradients="factored")
    with pytest.raises(ValueError, match="factored gradients need example_inputs"):
        velora_fx.apply(model, velora_fx.plan_of(pair("stack").factored))
    assert not carriers(model)


@pytest.mark.slow
def test_recomputed_blocks_have_factored_gradients_too() -> None:
    case = CASES["llama"]
    model, batch = case.build(), case.batch(32, 48)
    with pytest.raises(velora_fx.BudgetError) as caught:
        velora_fx.plan(model, 1e-9, batch, gradients="factored", method="auto")
    smallest, untouched = caught.value.plan.planned.peak_bytes, caught.value.plan.baseline.peak_bytes
    budget_gb = (smallest + 0.05 * (untouched - smallest)) / 2**30
    plan = velora_fx.plan(model, budget_gb, batch, gradients="factored", method="auto")
    assert plan.recomputed and plan.compressed
    velora_fx.apply(model, plan, batch)
    assert all(any(name.startswith(f"{item.region}.") for name in carriers(model)) for item in plan.recomputed)
    one_step(model, **batch)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_compiled_for_another_kind_of_call_it_is_refused(model: nn.Module) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    refused(model, lambda: compiled(rows().double(), torch.ones(4, 8, 1, dtype=torch.float64)), "in a new way")
