"""The measured peak of a real step, on the CPU against the allocator and on CUDA with its statistics replaced."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import velora_fx
from tests.helpers.allocator import peak_of
from tests.helpers.gradients import tightest
from tests.helpers.peaks import tensor_bytes
from tests.helpers.toys import rows, stack
from velora_fx.peaks import Curve, Measured, Peak
from velora_fx.runtime import measured_step

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports its start and end on stderr


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No hook and no profiler outlives a test."""
    before = set(_global_optimizer_post_hooks)
    yield
    assert set(_global_optimizer_post_hooks) <= before  # those of models that are gone may go too
    assert not torch._C._autograd._profiler_enabled()


def one_step(model: nn.Module, *optimizers: torch.optim.Optimizer, x: Any = None, set_to_none: bool = True) -> None:
    """A training step, of a batch of its own where none is given."""
    output = model(**x).loss if isinstance(x, dict) else model(large() if x is None else x)
    output.sum().backward()
    for optimizer in optimizers or [torch.optim.SGD(model.parameters(), lr=1e-3)]:
        optimizer.step()
        optimizer.zero_grad(set_to_none)


def large() -> Tensor:
    return rows(64, 64)


@cache
def plan(**options: Any) -> velora_fx.Plan:
    return velora_fx.plan(stack(), 4, (large(),), **options)


def optimised(**options: Any) -> nn.Module:
    return velora_fx.apply(stack(), plan(**options), (large(),))


def measured(model: nn.Module, *optimizers: torch.optim.Optimizer, **step: Any) -> velora_fx.Plan:
    """The plan with what is measured of a step of all optimizers, the second one."""
    one_step(model, *optimizers, **step)
    with velora_fx.measure(model):
        one_step(model, *optimizers, **step)
    return velora_fx.plan_of(model)


def llama(layers: int) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": layers, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=128)).train()
    ids = torch.randint(4, 128, (8, 256), generator=torch.Generator().manual_seed(0))
    return model, {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("target", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_measured_peak_is_the_allocators_and_close_to_the_predicted_one(target: str) -> None:
    torch._dynamo.reset()
    model, batch = llama(3 if target == "eager" else 1)
    tight = tightest(model, batch, compiled=target == "inductor", optimizer="adamw")
    budget = (tight.planned.peak_bytes + tight.baseline.peak_bytes) / 2
    velora_fx.optimize(model, budget / 2**30, batch, compiled=target == "inductor", method="compress")
    run = torch.compile(model, fullgraph=True) if target == "inductor" else model
    optimizer = torch.optim.AdamW(model.parameters())
    plan = measured(run, optimizer, x=batch)
    assert plan.compressed and plan.measured is not None
    states = [value for state in optimizer.state.values() for value in state.values()]
    held = tensor_bytes([*model.parameters(), *states])
    peak = peak_of(lambda: one_step(run, optimizer, x=batch))
    assert plan.measured.allocated_bytes == pytest.approx(held + peak, rel=0.01)
    assert plan.planned.peak_bytes == pytest.approx(plan.measured.allocated_bytes, rel=0.05)
    assert plan.measured.reserved_bytes is None
    assert plan.measured.breakdown["parameters"] == tensor_bytes(model.parameters())
    assert plan.measured.breakdown["optimizer"] == tensor_bytes(states)
    assert sum(plan.measured.breakdown.values()) == plan.measured.allocated_bytes


def test_a_step_of_several_batches_is_measured_as_one() -> None:
    model = optimised(gradient_accumulation=2)
    optimizer = torch.optim.AdamW(model.parameters())
    one_step(model, optimizer)
    with velora_fx.measure(model):
        model(large()).backward()
        one_step(model, optimizer)
    plan = velora_fx.plan_of(model)
    assert plan.measured is not None
    assert plan.measured.breakdown["gradients"] == tensor_bytes(model.parameters())
    assert plan.measured.allocated_bytes == pytest.approx(plan.planned.peak_bytes, rel=0.01)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_that_are_set_to_zero_in_place_are_there_all_the_time(set_to_none: bool) -> None:
    model = optimised(optimizer="sgd")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    plan = measured(model, optimizer, set_to_none=set_to_none)
    held = tensor_bytes([*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)])
    peak = peak_of(lambda: one_step(model, optimizer, set_to_none=set_to_none))
    assert plan.measured is not None
    assert plan.measured.allocated_bytes == pytest.approx(held + peak, rel=1e-3)
    at_peak = plan.planned.breakdown["gradients"]
    assert plan.measured.breakdown["gradients"] == (at_peak if set_to_none else tensor_bytes(model.parameters()))


@pytest.mark.filterwarnings("ignore:velora_fx")  # the plan is for AdamW alone
def test_the_state_of_all_optimizers_of_the_model_is_counted_and_that_of_others_is_not() -> None:
    model, other = optimised(), nn.Linear(4, 4)
    weights = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    rest = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    optimizers = [torch.optim.SGD(weights, lr=1e-3, momentum=0.9), torch.optim.AdamW(rest)]
    foreign = torch.optim.AdamW(other.parameters())
    one_step(other, foreign, x=torch.ones(2, 4))
    found = measured(model, *optimizers, foreign).measured
    states = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    assert found.breakdown["optimizer"] == tensor_bytes(value for value in states if isinstance(value, Tensor))


def test_a_model_and_an_optimizer_that_accelerate_prepared_are_measured() -> None:
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    model = optimised()
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    with velora_fx.measure(prepared):
        accelerator.backward(prepared(large()))
        optimizer.step()
        optimizer.zero_grad()
    assert velora_fx.plan_of(prepared).measured is not None


def test_a_plan_that_is_far_off_warns_with_the_category_that_differs_most() -> None:
    model = optimised(optimizer="none")
    for block in model.blocks:
        block.extra = nn.Parameter(torch.zeros(2**17))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.warns(UserWarning, match=r"the plan is -\d+\.\d+% off the peak of allocated memory .* in parameters"):
        measured(model, optimizer)


def test_a_larger_batch_shows_in_the_activations() -> None:
    model = optimised()
    with (
        pytest.warns(UserWarning, match="planned for x"),
        pytest.warns(UserWarning, match="most of it in activations and temporary"),
    ):
        measured(model, torch.optim.AdamW(model.parameters()), x=rows(128, 64))


def test_a_step_that_was_smaller_than_planned_for_is_no_mismatch_and_the_report_says_so() -> None:
    model = optimised()
    optimizer = torch.optim.AdamW(model.parameters())
    one_step(model, optimizer)  # before the step that is measured
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with velora_fx.measure(model):
            for x in (rows(16, 64), rows(32, 64)):
                model(x).backward()
            one_step(model, optimizer, x=rows(2, 64))
    plan = velora_fx.plan_of(model)
    assert plan.measured is not None and plan.measured.inputs == {"x": (32, 64, 32)}
    assert plan.measured.allocated_bytes < 0.8 * plan.planned.peak_bytes
    assert "that step was smaller than planned for: x 32 x 64 x 32" in str(plan)
    assert velora_fx.Plan.from_json(plan.to_json()) == plan


def test_without_an_optimizers_step_nothing_is_measured_and_the_error_says_what_to_do() -> None:
    model = optimised()
    with (
        pytest.raises(RuntimeError, match=r"measure around forward, backward and optimizer.step\(\)"),
        velora_fx.measure(model),
    ):
        model(large()).backward()
    assert velora_fx.plan_of(model).measured is None


def test_what_the_step_raises_is_raised_and_nothing_is_measured() -> None:
    model = optimised()
    with pytest.raises(ZeroDivisionError), velora_fx.measure(model):
        1 / 0  # noqa: B018
    assert velora_fx.plan_of(model).measured is None


def test_beside_another_profiler_nothing_is_measured_and_that_is_said() -> None:
    model = optimised()
    with (
        profile(activities=[ProfilerActivity.CPU]),
        pytest.raises(RuntimeError, match="another profiler runs"),
        velora_fx.measure(model),
    ):
        one_step(model)


def test_a_model_that_is_not_optimised_is_refused() -> None:
    with pytest.raises(RuntimeError, match="not optimised"), velora_fx.measure(stack()):
        pass


def test_what_an_earlier_profile_saw_is_not_taken_for_memory_of_the_step() -> None:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True):
        old = [torch.empty(2**22)]
    model = optimised()
    optimizer = torch.optim.AdamW(model.parameters())
    one_step(model, optimizer)
    with velora_fx.measure(model):
        old.clear()  # it is no part of the step
        one_step(model, optimizer)
    plan = velora_fx.plan_of(model)
    assert plan.measured is not None
    assert plan.measured.allocated_bytes == pytest.approx(plan.planned.peak_bytes, rel=1e-3)


def test_hooks_on_optimizers_stay_in_place_and_are_called() -> None:
    calls: list[Any] = []
    model = optimised(optimizer="sgd")
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: calls.append(optimizer))
    measured(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    handle.remove()
    assert len(calls) == 2


def test_the_measured_peak_is_a_part_of_the_plan_and_not_of_one_that_is_applied_anew() -> None:
    model = optimised()
    plan = measured(model, torch.optim.AdamW(model.parameters()))
    assert plan.measured is not None and velora_fx.Plan.from_json(plan.to_json()) == plan
    assert velora_fx.state_dict(model)["plan"]["measured"]["allocated_bytes"] == plan.measured.allocated_bytes
    assert velora_fx.plan_of(copy.deepcopy(model)).measured == plan.measured
    assert velora_fx.plan_of(velora_fx.apply(stack(), plan, (large(),))).measured is None


def test_on_cuda_it_reads_the_allocators_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def statistic(name: str, value: int | None) -> None:
        monkeypatch.setattr(torch.cuda, name, lambda where: asked.append(name) or value)

    statistic("reset_peak_memory_stats", None)
    statistic("memory_allocated", 5000)
    statistic("max_memory_allocated", 9000)
    statistic("max_memory_reserved", 12000)
    model = nn.Linear(32, 8, bias=False)
    curve = Curve({"gradients": (0, 512, 1024)}, ((0, "backward"),))
    found: list[Measured] = []
    monkeypatch.setattr("velora_fx.runtime.measure.device_of", lambda model, kind: torch.device("cuda", 1))
    monkeypatch.setattr("velora_fx.runtime.measure._storages", lambda *_: storages_of_a_step.pop(0))
    weight, gradient, state = (torch.zeros(size).untyped_storage() for size in (256, 256, 1))
    storages_of_a_step: list[dict[str, list[torch.UntypedStorage]]] = [
        {"parameters": [weight], "buffers": [], "gradients": [], "optimizer": []},
        {"parameters": [weight], "buffers": [], "gradients": [gradient], "optimizer": [state]},
    ]
    with measured_step(model, Peak(100, {"gradients": 512}, "backward", curve), "cuda", found.append):
        one_step(model, x=torch.ones(2, 32))
    # Blocks of 512 bytes: 1024 of parameters, 512 of state, half of 1024 of gradients as in the plan; 5000 - 1024 were
    # there besides at the start, fewer at the end.
    assert found == [
        Measured(
            9000, 12000,
            {"parameters": 1024, "buffers": 0, "gradients": 512, "optimizer": 512, "other": 5000 - 2560,
             "activations and temporary": 9000 - 2048 - 2440},
        )
    ]  # fmt: skip
    assert asked[0] == "reset_peak_memory_stats"


def test_a_plan_for_cuda_is_not_measured_on_cpu() -> None:
    model = optimised(device="cuda")
    with pytest.raises(ValueError, match="for one cuda device, and the model is on cpu"), velora_fx.measure(model):
        pass


@pytest.mark.filterwarnings("ignore:velora_fx")  # workspaces are as large as the whole step here
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_measured_peak_is_close_to_the_predicted_one() -> None:
    model, batch = llama(3)
    model.cuda()
    batch = {name: value.cuda() for name, value in batch.items()}
    velora_fx.optimize(model, 1, batch)
    plan = measured(model, torch.optim.AdamW(model.parameters()), x=batch)
    assert plan.measured is not None and plan.measured.reserved_bytes is not None
    own = plan.measured.allocated_bytes - plan.measured.breakdown["other"]
    assert plan.planned.tensor_bytes == pytest.approx(own, rel=0.05)
    assert plan.measured.reserved_bytes >= plan.measured.allocated_bytes


def test_a_batch_that_was_made_before_the_step_counts() -> None:
    model = optimised()
    plan = measured(model, torch.optim.AdamW(model.parameters()), x=large())
    assert plan.measured is not None
    assert plan.measured.allocated_bytes == pytest.approx(plan.planned.peak_bytes, rel=1e-3)
