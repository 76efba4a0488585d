"""The measured peak of a real step, on the CPU against the allocator and on CUDA with its statistics replaced."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import velora_fx
from tests.end_to_end.test_memory import measured_peak
from tests.helpers.allocator import peak_of
from tests.helpers.gradients import tightest
from tests.helpers.peaks import tensor_bytes
from tests.helpers.toys import rows, stack
from velora_fx.peaks import Curve, Measured, Peak
from velora_fx.runtime import Measurement
from velora_fx.runtime.measure import _Step
from velora_fx.session import Installed

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports its start and end on stderr


def pending() -> list[Measurement]:
    """The measurements that hang on all optimizers."""
    return [hook for hook in _global_optimizer_post_hooks.values() if isinstance(hook, Measurement)]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No hook and no profiler outlives a test."""
    yield
    gc.collect()
    one_step(nn.Linear(1, 1), torch.ones(1, 1))
    assert not pending()
    assert not torch._C._autograd._profiler_enabled()


def one_step(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
    """A training step."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1e-3)
    model(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def measured_of(model: nn.Module) -> Measured | None:
    return velora_fx.plan_of(model).measured


def large() -> Tensor:
    return rows(64, 64)


def optimised(**options: Any) -> nn.Module:
    return velora_fx.optimize(stack(), 4, (large(),), measure=True, **options)


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
    tight = tightest(model, batch, target=target, optimizer="adamw")
    budget = (tight.planned.peak_bytes + tight.baseline.peak_bytes) / 2
    velora_fx.optimize(model, budget / 2**30, batch, target=target, measure=True)
    run = torch.compile(model, fullgraph=True) if target == "inductor" else model
    optimizer = torch.optim.AdamW(model.parameters())
    for number in range(2):
        assert measured_of(model) is None
        run(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert (measured_of(model) is None) == (number == 0)
    plan = velora_fx.plan_of(run)
    assert plan.compressed and plan.measured is not None
    assert plan.measured.allocated_bytes == pytest.approx(measured_peak(run, batch), rel=0.01)
    assert plan.planned.peak_bytes == pytest.approx(plan.measured.allocated_bytes, rel=0.05)
    assert plan.measured.reserved_bytes is None
    assert plan.measured.breakdown["parameters"] == tensor_bytes(model.parameters())
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert plan.measured.breakdown["optimizer"] == tensor_bytes(states)
    assert sum(plan.measured.breakdown.values()) == plan.measured.allocated_bytes


def test_on_cpu_nothing_is_measured_unless_asked_for() -> None:
    model = velora_fx.optimize(stack(), 4, (large(),))
    assert not pending()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        one_step(model, large(), optimizer)
    assert measured_of(model) is None


def test_planning_at_the_first_forward_is_measured_too() -> None:
    model = velora_fx.optimize(stack(), 4, measure=True)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        one_step(model, large(), optimizer)
    assert measured_of(model) is not None


def test_the_step_is_the_one_between_two_optimizer_steps_however_many_batches_it_has() -> None:
    model = optimised(gradient_accumulation=2)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        assert measured_of(model) is None
        model(large()).backward()
        one_step(model, large(), optimizer)
    measured = measured_of(model)
    assert measured is not None
    assert measured.breakdown["gradients"] == tensor_bytes(model.parameters())
    predicted = velora_fx.plan_of(model).planned
    assert measured.allocated_bytes == pytest.approx(predicted.peak_bytes, rel=0.01)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_that_are_set_to_zero_in_place_are_there_all_the_time(set_to_none: bool) -> None:
    model = optimised(optimizer="sgd")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        model(large()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)

    for _ in range(2):
        step()
    measured = measured_of(model)
    held = tensor_bytes([*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert measured is not None
    assert measured.allocated_bytes == pytest.approx(held + peak_of(step), rel=1e-3)
    at_peak = velora_fx.plan_of(model).planned.breakdown["gradients"]
    assert measured.breakdown["gradients"] == (at_peak if set_to_none else tensor_bytes(model.parameters()))


def test_gradients_that_are_dropped_late_count_until_then() -> None:
    model = velora_fx.optimize(nn.Linear(256, 256), 4, (torch.ones(1, 256),), measure=True, optimizer="sgd")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the plan knows nothing of the scratch
        for _ in range(2):
            loss = model(torch.ones(1, 256)).sum()
            scratch = torch.ones(2**20)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            del scratch, loss
    measured = measured_of(model)
    assert measured is not None
    held = 2 * tensor_bytes(model.parameters()) + 2**22
    assert held <= measured.allocated_bytes <= held + 2**14


def test_optimizers_of_other_models_are_ignored() -> None:
    model, other = optimised(), nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        one_step(other, torch.ones(2, 4))
    one_step(model, large(), optimizer)
    for _ in range(3):
        one_step(other, torch.ones(2, 4))
    assert measured_of(model) is None
    one_step(model, large(), optimizer)
    assert measured_of(model) is not None


def test_the_state_of_all_optimizers_of_the_model_is_counted() -> None:
    model = optimised()
    weights: list[Any] = []
    rest: list[Any] = []
    for parameter in model.parameters():
        (weights if parameter.dim() == 2 else rest).append(parameter)
    optimizers = [torch.optim.SGD(weights, lr=1e-3, momentum=0.9), torch.optim.AdamW(rest)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the plan is for AdamW alone
        for _ in range(2):
            model(large()).backward()
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
    states = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    measured = measured_of(model)
    assert measured is not None
    assert measured.breakdown["optimizer"] == tensor_bytes(value for value in states if isinstance(value, Tensor))


def test_steps_that_a_gradient_scaler_skips_do_not_count() -> None:
    model = optimised()
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    for number in range(4):
        scaler.scale(model(large())).backward()
        if number == 1:
            next(model.parameters()).grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert (measured_of(model) is not None) == (number >= 2)


def test_a_model_and_an_optimizer_that_accelerate_prepared_are_measured() -> None:
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    model = optimised()
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    for _ in range(2):
        accelerator.backward(prepared(large()))
        optimizer.step()
        optimizer.zero_grad()
    assert measured_of(prepared) is not None


def test_an_optimizer_step_that_is_compiled_is_measured() -> None:
    torch._dynamo.reset()
    model, reference = optimised(), stack()
    for one in (model, reference):
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-3)
        step = torch.compile(optimizer.step, backend="eager") if one is model else optimizer.step
        for seed in range(3):
            torch.manual_seed(seed)
            one(large()).backward()
            step()
            optimizer.zero_grad()
    measured = measured_of(model)
    assert measured is not None and measured.breakdown["optimizer"] > 2 * tensor_bytes(model.parameters())
    for parameter, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)


def test_a_plan_that_is_far_off_warns_with_the_category_that_differs_most() -> None:
    model = optimised(optimizer="none")
    for block in model.blocks:
        block.extra = nn.Parameter(torch.zeros(2**17))
    optimizer = torch.optim.AdamW(model.parameters())
    one_step(model, large(), optimizer)
    with pytest.warns(UserWarning, match=r"the plan is -\d+\.\d+% off the peak of allocated memory .* in parameters"):
        one_step(model, large(), optimizer)
    assert measured_of(model) is not None


def test_a_larger_batch_shows_in_the_activations() -> None:
    model = optimised()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.warns(UserWarning, match="planned for x"):
        one_step(model, rows(128, 64), optimizer)
    with pytest.warns(UserWarning, match="most of it in activations and temporary"):
        one_step(model, rows(128, 64), optimizer)


def test_a_step_that_was_smaller_than_planned_for_is_no_mismatch_and_the_report_says_so() -> None:
    model = optimised()
    optimizer = torch.optim.AdamW(model.parameters())
    one_step(model, large(), optimizer)  # of the step before, which is not measured
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in (rows(16, 64), rows(32, 64), rows(2, 64)):
            model(x).backward()
        optimizer.step()
    plan = velora_fx.plan_of(model)
    assert plan.measured is not None and plan.measured.inputs == {"x": (32, 64, 32)}
    assert plan.measured.allocated_bytes < 0.8 * plan.planned.peak_bytes
    assert "that step was smaller than planned for: x 32 x 64 x 32" in str(plan)
    assert velora_fx.Plan.from_json(plan.to_json()) == plan


def in_the_middle() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model whose step is being measured."""
    model = optimised()
    optimizer = torch.optim.AdamW(model.parameters())
    one_step(model, large(), optimizer)
    assert torch._C._autograd._profiler_enabled()
    return model, optimizer


def test_restoring_a_model_ends_its_measurement() -> None:
    model, optimizer = in_the_middle()
    velora_fx.restore(model)
    assert not torch._C._autograd._profiler_enabled() and not pending()
    one_step(model, large(), optimizer)


def test_planning_again_measures_again() -> None:
    model, optimizer = in_the_middle()
    velora_fx.optimize(model, 4, (large(),), measure=True)
    assert not torch._C._autograd._profiler_enabled()
    assert len(pending()) == 1
    one_step(model, large(), optimizer)
    assert measured_of(model) is None
    one_step(model, large(), optimizer)
    assert measured_of(model) is not None


def test_a_deleted_model_ends_its_measurement() -> None:
    model, optimizer = in_the_middle()
    del model, optimizer
    gc.collect()
    assert not torch._C._autograd._profiler_enabled()
    one_step(nn.Linear(1, 1), torch.ones(1, 1))
    assert not pending()


def test_a_deleted_optimizer_makes_room_for_the_next() -> None:
    model, optimizer = in_the_middle()
    del optimizer
    gc.collect()
    assert not torch._C._autograd._profiler_enabled()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        assert measured_of(model) is None
        one_step(model, large(), optimizer)
    assert measured_of(model) is not None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_not_measured_and_the_original_is(copied: Any) -> None:
    model, optimizer = in_the_middle()
    other = copied(model)
    for _ in range(3):
        one_step(other, large())
    assert measured_of(other) is None and measured_of(model) is None
    one_step(model, large(), optimizer)
    assert measured_of(model) is not None


def test_a_profiler_that_is_running_is_waited_for() -> None:
    model = optimised()
    optimizer = torch.optim.AdamW(model.parameters())
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            one_step(model, large(), optimizer)
    assert "Optimizer.step#AdamW.step" in {event.key for event in profiler.key_averages()}
    assert measured_of(model) is None
    for _ in range(2):
        one_step(model, large(), optimizer)
    assert measured_of(model) is not None


def test_a_step_in_which_another_profiler_ran_is_measured_anew() -> None:
    model, optimizer = in_the_middle()
    with profile(activities=[ProfilerActivity.CPU]):
        torch.ones(4)
    one_step(model, large(), optimizer)
    assert measured_of(model) is None
    one_step(model, large(), optimizer)
    assert measured_of(model) is not None


def test_a_step_that_another_profiler_took_over_gives_no_number() -> None:
    # In a process of its own: PyTorch can crash when it frees a profile that another one has dropped.
    process = multiprocessing.get_context("spawn").Process(target=take_over)
    process.start()
    process.join()
    assert process.exitcode == 0


def take_over() -> None:
    model, optimizer = in_the_middle()
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    profiler.start()
    one_step(model, large(), optimizer)
    profiler.stop()
    assert measured_of(model) is None
    for _ in range(2):
        one_step(model, large(), optimizer)
    assert measured_of(model) is not None
    os._exit(0)  # nothing is freed


def test_what_an_earlier_profile_saw_is_not_taken_for_memory_of_the_step() -> None:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True):
        old = torch.empty(2**22)
    model, optimizer = in_the_middle()
    del old  # in the step that is measured, of whose profile it is no part
    one_step(model, large(), optimizer)
    measured = measured_of(model)
    assert measured is not None
    predicted = velora_fx.plan_of(model).planned.peak_bytes
    assert measured.allocated_bytes == pytest.approx(predicted, rel=1e-3)


def test_hooks_that_follow_stay_in_place_and_are_called() -> None:
    calls: list[Any] = []
    models = [optimised(optimizer="sgd"), optimised(optimizer="sgd")]
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: calls.append(optimizer))
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        for _ in range(2):
            one_step(model, large(), optimizer)
        assert measured_of(model) is not None
    assert len(calls) == 4
    handle.remove()
    for _ in range(2):
        one_step(models[0], large(), optimizers[0])


def test_the_measured_peak_is_a_part_of_the_plan_as_json_and_in_the_state() -> None:
    model = optimised()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        one_step(model, large(), optimizer)
    plan = velora_fx.plan_of(model)
    assert plan.measured is not None
    assert velora_fx.Plan.from_json(plan.to_json()) == plan
    assert velora_fx.state_dict(model)["plan"]["measured"]["allocated_bytes"] == plan.measured.allocated_bytes
    again = velora_fx.optimize(stack(), plan=plan, example_inputs=(large(),))
    assert measured_of(again) is None  # a plan that is applied anew was not measured there


def peak_with_gradients(at_peak: int, at_end: int) -> Peak:
    curve = Curve({"gradients": (0, at_peak, at_end)}, ((0, "backward"),))
    return Peak(100, {"gradients": at_peak}, "backward", curve)


def test_on_cuda_it_reads_the_allocators_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 1)
    asked: list[tuple[str, Any]] = []

    def statistic(name: str, value: int | None) -> None:
        monkeypatch.setattr(torch.cuda, name, lambda where: asked.append((name, where)) or value)

    statistic("reset_peak_memory_stats", None)
    statistic("memory_allocated", 5000)
    statistic("max_memory_allocated", 9000)
    statistic("max_memory_reserved", 12000)
    weight, gradient = torch.zeros(256), torch.zeros(128)
    storages = {
        "parameters": [weight.untyped_storage()], "buffers": [], "gradients": [gradient.untyped_storage()],
        "optimizer": [torch.zeros(1).untyped_storage()],
    }  # fmt: skip
    step = _Step(storages, device)
    assert asked == [("reset_peak_memory_stats", device), ("memory_allocated", device)]
    new_gradient = {**storages, "gradients": [torch.zeros(256).untyped_storage()]}
    peaks = step.stop()
    assert peaks == (9000, 12000)
    measured = step.measured(*peaks, new_gradient, peak_with_gradients(128, 256))
    # Blocks of 512 bytes: 1024 of parameters, 512 of state, half of 1024 of gradients as in the plan; 5000 - 2048
    # were there besides at the start, fewer at the end.
    assert measured == Measured(
        9000, 12000,
        {"parameters": 1024, "buffers": 0, "gradients": 512, "optimizer": 512, "other": 5000 - 2560,
         "activations and temporary": 9000 - 2048 - 2440},
    )  # fmt: skip
    assert {where for _, where in asked} == {device}


@pytest.mark.parametrize("asked", [False, True])
def test_a_plan_for_cuda_is_measured_where_that_is_asked_for(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = velora_fx.plan(stack(), 4, (rows(),), device="cuda")
    found: list[Any] = []
    monkeypatch.setattr("velora_fx.session.Measurement", lambda *given: found.append(given[1:3]))
    installing = velora_fx.session.install

    def install(*given: Any) -> Any:  # planning itself is not to look for a GPU
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        return installing(*given)

    monkeypatch.setattr("velora_fx.session.install", install)
    velora_fx.optimize(stack(), plan=plan, example_inputs=(rows(),), measure=asked)
    assert found == ([(plan.planned, "cuda")] if asked else [])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_measured_peak_is_close_to_the_predicted_one() -> None:
    model, batch = llama(3)
    model.cuda()
    batch = {name: value.cuda() for name, value in batch.items()}
    velora_fx.optimize(model, 1, batch, measure=True)
    optimizer = torch.optim.AdamW(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # workspaces are as large as the whole step here
        for _ in range(2):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    plan = velora_fx.plan_of(model)
    assert plan.measured is not None and plan.measured.reserved_bytes is not None
    own = plan.measured.allocated_bytes - plan.measured.breakdown["other"]
    assert plan.planned.tensor_bytes == pytest.approx(own, rel=0.05)
    assert plan.measured.reserved_bytes >= plan.measured.allocated_bytes


def test_parameters_on_another_kind_of_device_are_not_measured() -> None:
    model = stack()
    velora_fx.optimize(model, 4, (rows(),))
    holder = Installed(velora_fx.plan_of(model), [], [])
    holder.measurement = Measurement(model, velora_fx.plan_of(model).planned, "cuda", {}, holder.take)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(3):
        one_step(model, rows(), optimizer)
    assert holder.plan.measured is None
    assert not pending()
