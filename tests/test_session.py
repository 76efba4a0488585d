"""What `optimize`, `restore` and `load_state_dict` leave behind, also where they fail."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import velora_fx
from tests.helpers.gradients import regions_of, tightest
from tests.helpers.toys import Of, rows, stack
from velora_fx.runtime import STATE

BATCH = (rows(16, 64),)


@cache
def tight(**options: Any) -> velora_fx.Plan:
    return tightest(stack(), BATCH, **options)


def optimized(**options: Any) -> nn.Module:
    return velora_fx.apply(stack(), tight(**options), BATCH)


def is_untouched(model: nn.Module) -> bool:
    return not any(STATE in vars(m) or "forward" in vars(m) or m._forward_pre_hooks for m in model.modules())


def test_a_state_of_another_seed_is_planned_for_anew() -> None:
    saved, model = velora_fx.state_dict(optimized(seed=7)), optimized(seed=0)
    velora_fx.load_state_dict(model, saved)
    model(*BATCH).backward()
    assert velora_fx.plan_of(model).seed == 7
    expected = {region.name: region.projections for region in regions_of(optimized(seed=7))}
    for region in regions_of(model):
        assert all(torch.equal(v, expected[region.name][name]) for name, v in region.projections.items())


def test_a_state_that_recomputes_brings_its_recomputation() -> None:
    source, model = optimized(method="exact"), velora_fx.optimize(stack(), 4, BATCH, optimizer="none")
    velora_fx.load_state_dict(model, velora_fx.state_dict(source))
    model(*BATCH).backward()
    assert velora_fx.plan_of(model).recomputed == tight(method="exact").recomputed != ()


def test_a_state_made_with_a_filter_loads_without_it() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.Linear(64, 64))

    ids, source = (torch.arange(512).reshape(8, 64) % 64,), build()
    plan = tightest(source, ids, filter_fn=lambda module, name: True, loss_fn=Tensor.sum)
    velora_fx.apply(source, plan, ids)
    model = velora_fx.load_state_dict(build(), velora_fx.state_dict(source))
    model(*ids).sum().backward()
    assert velora_fx.plan_of(model).decisions == plan.decisions


@pytest.mark.parametrize("wrap", [torch.compile, lambda model: nn.ModuleDict({"inner": model})])
def test_restore_through_a_wrapper_leaves_nothing(wrap: Any) -> None:
    model = optimized()
    velora_fx.restore(wrap(model))
    assert is_untouched(model)
    with pytest.raises(RuntimeError, match="not optimised"):
        velora_fx.plan_of(model)


def fails_without_gradients(m: Of, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        raise RuntimeError("trains only")
    return m.stack(x)  # type: ignore[no-any-return]


def test_a_calibration_that_fails_leaves_the_model_as_it_was() -> None:
    model = Of(fails_without_gradients, stack=stack())
    plan = tightest(model, BATCH, projection="batch_mean")
    with pytest.raises(RuntimeError, match="trains only"):
        velora_fx.apply(model, plan, BATCH)
    assert is_untouched(model)
    signs = velora_fx.apply(model, tightest(model, BATCH), BATCH)
    with pytest.raises(RuntimeError, match="trains only"):
        velora_fx.apply(model, plan, BATCH)
    assert velora_fx.plan_of(signs).projection == "signs" and regions_of(signs)
    assert signs._forward_pre_hooks  # larger batches are still warned of


def test_a_state_whose_projections_do_not_fit_never_runs() -> None:
    state = velora_fx.state_dict(optimized(projection="batch_mean"))
    state["projections"].popitem()
    model = velora_fx.load_state_dict(stack(), state)
    for _ in range(2):
        with pytest.raises(ValueError, match="projections are for other tensors"):
            model(*BATCH)


def test_a_plan_of_a_wider_model_is_refused() -> None:
    plan, narrow = tightest(stack(width=64), (rows(16, 64, 64),)), tight()
    with pytest.raises(ValueError, match="of width"):
        velora_fx.apply(stack(width=32), replace(plan, inputs=narrow.inputs, baseline=narrow.baseline), BATCH)


def test_a_model_wrapped_by_torch_compile_is_refused_with_the_way_out() -> None:
    for call in (velora_fx.optimize, velora_fx.plan):
        with pytest.raises(ValueError, match="pass the model itself, and compile it afterwards"):
            call(torch.compile(stack()), 4, BATCH)  # type: ignore[type-var]


def test_planning_at_the_first_forward_copies_no_optimizer_and_no_loss() -> None:
    class Uncopied:
        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            raise AssertionError("copied")

        def __call__(self, output: Tensor) -> Tensor:
            return output

    model = velora_fx.optimize(stack(), 4, loss_fn=Uncopied(), optimizer="none")
    model(*BATCH).backward()
    assert velora_fx.plan_of(model).fits


@pytest.mark.parametrize("text", ["[]", "null", "5", json.dumps({"schema": 6}), "{}"])
def test_what_is_no_plan_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="plan"):
        velora_fx.Plan.from_json(text)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda output: None, "must be a tensor, got NoneType"),
        (lambda output: 1.0, "must be a tensor, got float"),
        (lambda output: output.detach(), "does not depend on any trained parameter"),
    ],
)
def test_a_loss_that_cannot_be_trained_on_is_a_value_error(loss_fn: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        velora_fx.plan(stack(), None, BATCH, loss_fn=loss_fn)


def test_a_plan_with_sizes_of_its_own_is_applied_and_loaded() -> None:
    """A prime width: none of the usual sizes divides it."""
    x = torch.randn(64, 509)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(509, 509), nn.GELU(), nn.Linear(509, 509), nn.GELU(), nn.Linear(509, 4))

    plan = tightest(build(), (x,), sub_token_sizes=(509,), loss_fn=Tensor.sum)
    assert {decision.sub_token_size for decision in plan.compressed} == {509}
    model = velora_fx.apply(build(), plan, (x,))
    model(x).sum().backward()
    again = velora_fx.load_state_dict(build(), velora_fx.state_dict(model))
    again(x).sum().backward()
    assert velora_fx.plan_of(again).compressed == plan.compressed
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None and torch.equal(ours.grad, theirs.grad)
