"""Plans that are applied to a model in another state, and models that are distributed already."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import velora_fx
from tests.end_to_end.test_memory import batch_of, llama
from tests.helpers.gradients import compressed_weights, tightest
from tests.helpers.toys import rows, stack
from tests.test_session import is_untouched
from velora_fx.first_forward import FirstForward


def test_a_plan_made_without_autocast_is_refused_under_it_with_the_reason() -> None:
    model, batch = llama().train(), batch_of(llama())
    plan = tightest(model, batch)
    other = "autocast is bfloat16, and was off"
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=other):
        velora_fx.apply(model, plan, batch)
    assert is_untouched(model)


def test_a_plan_made_under_autocast_is_refused_without_it_with_the_reason() -> None:
    model, batch = llama().train(), batch_of(llama())
    with torch.autocast("cpu", torch.bfloat16):
        plan = tightest(model, batch)
    with pytest.raises(ValueError, match=r"autocast is off, and was bfloat16"):
        velora_fx.apply(model, plan, batch)
    assert is_untouched(model)


@pytest.mark.slow
@pytest.mark.parametrize("lazy", [False, True], ids=["at once", "at the first forward"])
def test_a_compiled_plan_is_applied_for_compiled_steps(lazy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        plan, model = tightest(stack(), (rows(),), compiled=True), stack()
        velora_fx.apply(model, plan, None if lazy else (rows(),))
        model(rows())
    assert velora_fx.plan_of(model).compiled
    assert len(compressed_weights(model)) == len({name for d in plan.compressed for name in d.consumers})


@pytest.fixture
def group(tmp_path: Any) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: nn.Module) -> nn.Module:
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block)
    fully_shard(model)
    return model


WRAPPED = r"comes before DDP, FSDP and DTensor, and .* is wrapped already: call velora_fx.optimize on the plain model"


@pytest.mark.parametrize("gradients", ["dense", "factored"])
@pytest.mark.parametrize("wrap", [sharded, DistributedDataParallel], ids=["FSDP2", "DDP"])
def test_a_model_that_is_wrapped_already_is_refused(group: None, wrap: Any, gradients: str) -> None:
    plan = tightest(stack(), (rows(),), gradients=gradients)
    model = wrap(stack())
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    for call in (
        lambda: velora_fx.plan(model, 1, (rows(),), gradients=gradients),
        lambda: velora_fx.optimize(model, 1, (rows(),), gradients=gradients),
        lambda: velora_fx.apply(model, plan, (rows(),)),
        lambda: velora_fx.apply(model, replace(plan, gradients="dense")),
    ):
        with pytest.raises(ValueError, match=WRAPPED):
            call()
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    model(rows()).backward()


def test_a_model_that_is_sharded_before_its_first_forward_is_refused_there(group: None) -> None:
    model = sharded(velora_fx.optimize(stack(), 1))
    with pytest.raises(ValueError, match=WRAPPED):
        model(rows())
    velora_fx.restore(model)
    assert not any(isinstance(vars(module).get("forward"), FirstForward) for module in model.modules())
    model(rows()).backward()


def test_a_model_under_ddp_is_planned_at_its_first_forward(group: None) -> None:
    plan = tightest(stack(), (rows(),))
    model = DistributedDataParallel(velora_fx.apply(stack(), plan))
    model(rows()).backward()
    assert velora_fx.plan_of(model).compressed == plan.compressed


def test_planning_inside_of_a_forward_that_was_put_under_autocast_leaves_autocast_as_it_was() -> None:
    model = velora_fx.optimize(stack(), 1)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    model(rows()).backward()
    assert not torch.is_autocast_enabled("cpu")
    assert velora_fx.plan_of(model).autocast == "bfloat16"


def test_a_plan_made_without_autocast_says_so_once_where_the_model_is_trained_under_it() -> None:
    plan = tightest(stack(), (rows(),))
    model = velora_fx.apply(stack(), plan, (rows(),))
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning) as found:
        for _ in range(2):
            model(rows()).backward()
    said = [str(warning.message) for warning in found if "velora_fx" in str(warning.message)]
    assert len(said) == 1 and "runs with autocast bfloat16, and was planned with autocast off" in said[0]
