"""The public functions: what they refuse, what they leave alone, and when they plan."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import velora_fx
from tests.helpers.gradients import (
    assert_same_gradients,
    compressed_weights,
    rebuilt_inputs,
    regions_of,
    step,
    tightest,
)
from tests.helpers.toys import Block, compressed, rows, stack
from tests.helpers.zoo import ZOO, loss_of
from velora_fx.simulate import fake_copy, fake_mode

LLAMA = next(case for case in ZOO if case.name == "llama")


def assert_untouched(model: nn.Module) -> None:
    """Nothing of ours is on the model."""
    assert not regions_of(model)
    assert not [name for module in model.modules() for name in vars(module) if name in ("forward", "_velora_fx")]


@pytest.mark.parametrize("budget", [0, -1, math.nan, math.inf, 10**400, "lots", "24 GB", True, [24]])
def test_a_bad_budget_is_refused(budget: Any) -> None:
    model = stack()
    with pytest.raises(ValueError, match=r"budget_gb must be a .*number of GiB") as caught:
        velora_fx.optimize(model, budget, (rows(),))
    assert repr(budget) in str(caught.value)
    assert_untouched(model)


def test_the_device_as_budget_needs_a_cuda_device() -> None:
    with pytest.raises(ValueError, match="needs a CUDA device"):
        velora_fx.optimize(stack(), "device", (rows(),))


def cuda_budget(budget_bytes: int) -> velora_fx.Plan:
    return velora_fx.plan(stack(), (budget_bytes + 0.5) / 2**30, (rows(64, 64),), device="cuda", method="compress")


def test_on_cuda_the_overhead_is_a_part_of_every_peak_by_name() -> None:
    plan = cuda_budget(2**40)
    for peak in (plan.baseline, plan.planned):
        assert peak.peak_bytes == sum(peak.breakdown.values()) + sum(peak.overhead.values())
        assert list(peak.overhead) == ["CUDA context", "cuBLAS workspaces", "allocator slack", "fragmentation"]
    assert plan.overhead_bytes == sum(plan.planned.overhead.values())
    assert velora_fx.Plan.from_json(plan.to_json()) == plan
    for name in plan.planned.overhead:
        assert f"\n{name}" in str(plan)


def test_on_cuda_no_plan_exceeds_its_budget_and_the_smallest_reachable_one_is_reached() -> None:
    with pytest.raises(velora_fx.BudgetError, match="CUDA context") as caught:
        cuda_budget(0)
    smallest, baseline = caught.value.smallest_peak_bytes, cuda_budget(2**40).baseline.peak_bytes
    fragmentation = {caught.value.plan.planned.overhead["fragmentation"]}
    for share in (0.0, 0.3, 0.6, 0.9):
        budget = int(smallest + share * (baseline - smallest))
        plan = cuda_budget(budget)
        assert plan.compressed and plan.planned.peak_bytes <= budget
        fragmentation.add(plan.planned.overhead["fragmentation"])
    assert len(fragmentation) > 2  # it follows the tensors
    with pytest.raises(velora_fx.BudgetError):
        cuda_budget(smallest - 1)


@pytest.mark.parametrize("missing_bytes", [0, 1])
def test_the_device_as_budget_counts_the_overhead_once(missing_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    baseline = cuda_budget(2**40).baseline
    capacity = baseline.peak_bytes - missing_bytes
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=capacity))
    plan = velora_fx.plan(stack(), "device", (rows(64, 64),), device="cuda")
    assert plan.budget_bytes == capacity
    assert bool(plan.compressed) == bool(missing_bytes)
    assert plan.planned.tensor_bytes <= capacity - plan.overhead_bytes
    assert plan.baseline == baseline


def test_a_budget_above_the_device_warns_when_planning_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=2**31))
    with pytest.warns(UserWarning, match=r"budget of 4\.00 GiB is above the 2\.00 GiB that cuda has"):
        velora_fx.plan(stack(), 4, (rows(),), device="cuda")


def test_the_plan_names_the_inputs_that_it_holds_for() -> None:
    batch = LLAMA.batch(2, 12)
    plan = velora_fx.plan(LLAMA.build(), 4, batch)
    assert [(item.name, item.shape, item.dtype) for item in plan.inputs] == [
        (name, tuple(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in batch.items()
    ]
    assert velora_fx.plan(stack(), 4, (rows(),)).inputs == velora_fx.plan(stack(), 4, {"x": rows()}).inputs
    assert velora_fx.Plan.from_json(plan.to_json()) == plan


def test_what_is_neither_a_budget_nor_a_plan_is_refused() -> None:
    model = stack()
    with pytest.raises(ValueError, match=r"optimize needs a budget: budget_gb=24"):
        velora_fx.optimize(model)
    with pytest.raises(ValueError, match=r"velora_fx.apply\(model, plan\) applies one"):
        velora_fx.optimize(model, velora_fx.plan(model, None, (rows(),)))
    with pytest.raises(ValueError, match=r"got str: Plan\.from_json reads one"):
        velora_fx.apply(model, "{}")
    assert_untouched(model)


def test_a_plan_for_another_step_is_refused_with_what_differs() -> None:
    plan = tightest(stack(), (rows(),))
    model = stack()
    cases = (
        (plan, (rows(2),), r"x is 2 x 8 x 32 float32, and was 4 x 8 x 32 float32"),
        (replace(plan, torch_version="1.13.0"), (rows(),), r"PyTorch is .*, and was 1.13.0"),
        (replace(plan, autocast="bfloat16"), (rows(),), r"autocast is off, and was bfloat16"),
    )
    for other, inputs, message in cases:
        with pytest.raises(ValueError, match=message):
            velora_fx.apply(model, other, inputs)
    assert_untouched(model)


def test_a_plan_of_a_model_of_another_size_is_refused_with_both_sizes() -> None:
    for other in (stack(num_blocks=4), stack(width=64)):
        with pytest.raises(ValueError, match=r"the parameters take .* KiB, and took .* KiB"):
            velora_fx.apply(other, tightest(stack(), (rows(),)), (rows(),))
        assert_untouched(other)


def test_a_class_in_the_place_of_a_model_is_refused() -> None:
    for call in (velora_fx.optimize, velora_fx.plan):
        with pytest.raises(ValueError, match=r"model must be a torch.nn.Module, got <class"):
            call(nn.Linear, 1, (rows(),))  # type: ignore[type-var]


def test_a_model_without_trainable_products_is_refused() -> None:
    model = stack().requires_grad_(False)
    for inputs in (None, (rows(),)):
        with pytest.raises(ValueError, match="no trainable matrix product"):
            velora_fx.optimize(model, 1, inputs)
    assert_untouched(model)


def test_example_inputs_that_do_not_fit_the_forward_are_refused() -> None:
    model = stack()
    for inputs in ({"tokens": rows()}, (), (1, 2, 3, 4, 5)):
        with pytest.raises(ValueError, match="do not fit the forward of Stack"):
            velora_fx.optimize(model, 1, inputs)
    with pytest.raises(ValueError, match="example_inputs must be a dict"):
        velora_fx.optimize(model, 1, "text")
    assert_untouched(model)


def test_example_inputs_may_be_a_dict_a_tuple_a_tensor_or_a_pair() -> None:
    x = rows()
    forms: list[Any] = [{"x": x}, (x,), [x], x, ((x,), {}), ((), {"x": x})]
    plans = [velora_fx.plan(stack(), 1, inputs) for inputs in forms]
    assert len({plan.baseline.peak_bytes for plan in plans}) == 1


def test_what_the_users_forward_raises_is_shown_as_it_is() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyError("the user's own mistake")

    model = Broken()
    with pytest.raises(KeyError, match="the user's own mistake"):
        velora_fx.optimize(model, 1, (rows(),))
    assert_untouched(model)
    velora_fx.optimize(model, 1)
    with pytest.raises(KeyError, match="the user's own mistake"):
        model(rows())


def test_an_unreachable_budget_tells_the_smallest_peak_the_breakdown_and_what_to_try() -> None:
    model = stack()
    with pytest.raises(velora_fx.BudgetError, match="smallest peak that can be reached") as caught:
        velora_fx.optimize(model, 1e-6, (rows(),))
    error = caught.value
    assert isinstance(error, ValueError)
    assert error.smallest_peak_bytes == error.plan.planned.peak_bytes > error.plan.budget_bytes
    for word in ("parameters", "activations", "Try"):
        assert word in str(error)
    assert_untouched(model)


def test_a_sub_token_size_that_divides_nothing_is_refused() -> None:
    model = stack()
    with pytest.raises(ValueError, match=r"sub_token_sizes .*7.* divides none .*32"):
        velora_fx.optimize(model, 1, (rows(),), sub_token_sizes=(7,))
    assert_untouched(model)


def test_a_plan_of_another_model_is_refused() -> None:
    other = tightest(stack(num_blocks=5), (rows(),))
    model = stack()
    of_this_size = replace(other, baseline=tightest(model, (rows(),)).baseline)
    with pytest.raises(ValueError, match="make the plan with this model"):
        velora_fx.apply(model, of_this_size, (rows(),))
    assert_untouched(model)


def test_the_plan_is_not_there_before_the_first_training_forward() -> None:
    model = velora_fx.optimize(stack(), 1)
    with pytest.raises(RuntimeError, match="not planned yet"):
        velora_fx.plan_of(model)
    with torch.no_grad():
        model(rows())
    with pytest.raises(RuntimeError, match="not planned yet"):
        velora_fx.plan_of(model)
    with pytest.raises(RuntimeError, match="not optimised"):
        velora_fx.plan_of(stack())


def test_planning_happens_at_the_first_training_forward_and_equals_planning_at_once() -> None:
    budget = tightest(stack(), (rows(64, 64),), optimizer="adamw").planned.peak_bytes * 1.02 / 2**30
    at_once = velora_fx.optimize(stack(), budget, (rows(64, 64),), method="compress")
    lazy = velora_fx.optimize(stack(), budget, method="compress")
    for model in (at_once, lazy):
        step(model, {"x": rows(64, 64)}, loss_of)
    assert velora_fx.plan_of(at_once).compressed
    assert velora_fx.plan_of(lazy) == velora_fx.plan_of(at_once)
    assert_same_gradients(lazy, at_once)


def test_the_whole_model_as_one_region_is_compressed_in_its_first_forward_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 4)).train()
    plan = tightest(model, (rows(),))
    lazy = velora_fx.apply(copy.deepcopy(model), plan)
    step(lazy, {"input": rows()}, lambda output: output.square().mean())
    with rebuilt_inputs(model, compressed_weights(lazy)):
        step(model, {"input": rows()}, lambda output: output.square().mean())
    assert compressed_weights(lazy)
    assert_same_gradients(lazy, model)


def whole() -> nn.Module:
    """A model without blocks: it is one region itself."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 4)).train()


def gradients_of(model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(7)
    model(rows()).square().mean().backward()
    return [parameter.grad for parameter in model.parameters()]


def wrap_forward(model: nn.Module) -> None:
    """What libraries do that put a closure in the place of a forward."""
    old = model.forward
    model.forward = lambda *args, **kwargs: old(*args, **kwargs)


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("make", [stack, whole])
def test_a_forward_that_is_wrapped_before_the_first_step_is_planned_and_compressed(make: Any) -> None:
    plan = tightest(make(), (rows(),))
    model = velora_fx.apply(make(), plan)
    wrap_forward(model)
    expected = gradients_of(velora_fx.apply(make(), plan, (rows(),)))
    assert equal(gradients_of(model), expected)
    assert not equal(expected, gradients_of(make()))
    assert velora_fx.plan_of(model).compressed


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("make", [stack, whole])
def test_restore_reaches_a_forward_that_was_wrapped_afterwards(make: Any, lazy: bool) -> None:
    plan = tightest(make(), (rows(),))
    model = velora_fx.apply(make(), plan, None if lazy else (rows(),))
    wrap_forward(model)
    gradients_of(model)
    velora_fx.restore(model)
    assert equal(gradients_of(model), gradients_of(make()))


def test_planning_for_a_model_whose_forward_is_a_closure_leaves_its_parameters_alone() -> None:
    model = stack()
    wrap_forward(model)
    before = [parameter.clone() for parameter in model.parameters()]
    with contextlib.suppress(ValueError):
        velora_fx.plan(model, 1, (rows(),))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert equal(before, list(model.parameters()))


class Outer(nn.Module):
    """Holds a model in an attribute of a name of its own, as trainers do."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)


def test_the_plan_is_found_in_a_module_that_holds_the_model() -> None:
    model = compressed(stack(), rows())
    assert velora_fx.plan_of(Outer(model)) is velora_fx.plan_of(model)
    assert velora_fx.plan_of(nn.Sequential(nn.Identity(), Outer(model))) is velora_fx.plan_of(model)


@pytest.mark.slow
def test_a_model_in_eval_mode_is_planned_for_training_and_stays_in_eval_mode() -> None:
    expected = tightest(stack(), (rows(),))
    model = stack().eval()
    plan = tightest(model, (rows(),))
    assert (plan.baseline, plan.planned) == (expected.baseline, expected.planned)
    assert plan.decisions == expected.decisions
    assert any("eval" in note for note in plan.notes)
    assert not any("eval" in note for note in expected.notes)
    velora_fx.apply(model, plan, (rows(),))
    assert not any(module.training for module in model.modules())
    optimised = compressed(stack(), rows())
    assert equal(gradients_of(model.train()), gradients_of(optimised))


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = stack()
    model.blocks[1].lock = threading.Lock()
    with pytest.raises(ValueError, match="cannot be copied"):
        velora_fx.plan(model, 1, (rows(),))
    assert_untouched(model)


class Noted(Block):
    """Reads an attribute of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.up.weight.factor = 2.0

    def forward(self, x: torch.Tensor, mask: Any = None, cache: Any = None) -> torch.Tensor:
        return super().forward(x * self.up.weight.factor, mask, cache)


def test_what_a_parameter_carries_as_attributes_is_there_in_planning() -> None:
    model = stack()
    model.blocks = nn.ModuleList(Noted() for _ in range(3))
    plan = tightest(model, (rows(),))
    assert "blocks.0.up" in {consumer for decision in plan.compressed for consumer in decision.consumers}
    velora_fx.apply(model, plan, (rows(),))
    assert {parameter.grad is None for parameter in model.parameters()} == {True}
    gradients_of(model)
    assert regions_of(model)


class Branching(Block):
    """Looks at the values of its activations."""

    def forward(self, x: torch.Tensor, mask: Any = None, cache: Any = None) -> torch.Tensor:
        return super().forward(x if x.sum() > 0 else -x, mask, cache)


def test_a_forward_that_depends_on_values_is_refused_because_planning_has_none() -> None:
    model = stack()
    model.blocks = nn.ModuleList(Branching() for _ in range(3))
    with pytest.raises(ValueError, match="values"):
        velora_fx.plan(model, 1, (rows(),))
    assert_untouched(model)


def test_a_budget_that_is_met_leaves_training_bit_identical() -> None:
    model, reference = stack(), stack()
    velora_fx.optimize(model, 4, (rows(),))
    assert not regions_of(model)
    assert not velora_fx.plan_of(model).compressed
    for one in (model, reference):
        step(one, {"x": rows()}, loss_of)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


def test_a_second_call_plans_again() -> None:
    model = compressed(stack(), rows())
    first = velora_fx.plan_of(model)
    assert velora_fx.optimize(model, 4, (rows(),)) is model
    assert first.compressed and not velora_fx.plan_of(model).compressed
    assert not regions_of(model)


def test_a_failed_second_call_leaves_the_first_plan_in_place() -> None:
    model = compressed(stack(), rows())
    first = velora_fx.plan_of(model)
    with pytest.raises(velora_fx.BudgetError):
        velora_fx.optimize(model, 1e-6, (rows(),))
    assert velora_fx.plan_of(model) is first
    assert regions_of(model)


def test_planning_changes_nothing() -> None:
    model = stack()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    tightest(model, (rows(),))
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert_untouched(model)


def test_a_model_on_the_meta_device_can_be_planned_for() -> None:
    real = velora_fx.plan(stack(), 1, (rows(),))
    with torch.device("meta"):
        empty = stack()
    assert velora_fx.plan(empty, 1, (rows(),)) == real


def test_the_filter_decides_which_weights_may_be_compressed() -> None:
    plan = tightest(stack(), (rows(),), filter_fn=lambda module, name: name.endswith("up"))
    assert {c for d in plan.compressed for c in d.consumers} == {f"blocks.{i}.up" for i in range(3)}
    assert {s.module for s in plan.skipped if "filter_fn" in s.reason} == {
        *(f"blocks.{i}.down" for i in range(3)),
        "head",
    }


def test_tied_and_vocabulary_weights_are_left_out_by_default_and_the_filter_overrides() -> None:
    batch = LLAMA.batch(2, 12)
    assert any("vocabulary" in s.reason for s in tightest(LLAMA.build(), batch).skipped if s.module == "lm_head")
    every = tightest(LLAMA.build(), batch, filter_fn=lambda module, name: True)
    assert "lm_head" in {c for d in every.compressed for c in d.consumers}


def test_wanted_sub_token_sizes_are_used() -> None:
    plan = tightest(stack(), (rows(),), sub_token_sizes=(4, 8))
    assert {d.sub_token_size for d in plan.compressed} == {8}


@pytest.mark.parametrize("optimizer", ["none", "sgd", "adamw", torch.optim.RMSprop, torch.optim.Adagrad])
def test_optimizer_state_is_planned_for(optimizer: Any) -> None:
    model = stack()
    plan = velora_fx.plan(model, 1, (rows(),), optimizer=optimizer)
    parameters = sum(p.numel() * 4 for p in model.parameters())
    tensors_per_weight = {"none": 0, "sgd": 0, "adamw": 2}.get(optimizer, 1) if isinstance(optimizer, str) else 1
    assert tensors_per_weight * parameters <= plan.baseline.breakdown["optimizer"] <= (
        tensors_per_weight * parameters + 8 * len(list(model.parameters()))
    )  # fmt: skip


def test_an_optimizer_instance_is_planned_for_with_its_groups() -> None:
    model = stack()
    head = torch.optim.SGD(model.head.parameters(), lr=0.1, momentum=0.9)
    plan = velora_fx.plan(model, 1, (rows(),), optimizer=head)
    assert plan.baseline.breakdown["optimizer"] == sum(p.numel() * 4 for p in model.head.parameters())
    assert not head.state
    with pytest.raises(ValueError, match="not the model's"):
        velora_fx.plan(stack(), 1, (rows(),), optimizer=head)


def test_the_state_round_trips_into_an_untouched_model() -> None:
    model = compressed(stack(), rows(), projection="batch_mean")
    buffer = io.BytesIO()
    torch.save(velora_fx.state_dict(model), buffer)
    buffer.seek(0)
    fresh = velora_fx.load_state_dict(stack(), torch.load(buffer, weights_only=True))
    for one in (model, fresh):
        step(one, {"x": rows()}, loss_of)
    assert velora_fx.plan_of(fresh) == velora_fx.plan_of(model)
    assert_same_gradients(fresh, model)


def test_batch_mean_projects_on_the_normalised_mean_sub_token_of_the_example_inputs() -> None:
    torch.manual_seed(0)
    drawing = nn.BatchNorm1d(8), nn.Dropout(0.1)
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 16), *drawing, nn.Tanh(), nn.Linear(16, 4)).train()
    x = rows() + 1.0
    with torch.no_grad():
        model[0].bias.add_(0.5)
    plan = tightest(model, (x,), sub_token_sizes=(8,), projection="batch_mean")
    generator = torch.get_rng_state()
    velora_fx.apply(model, plan, (x,))
    assert torch.equal(torch.get_rng_state(), generator)
    assert not model[2].running_mean.any() and model[2].num_batches_tracked == 0
    mean = F.layer_norm(x, (32,), bias=model[0].bias, weight=model[0].weight).double().reshape(-1, 8).mean(0)
    v = compressed_weights(model)["1.weight"]
    assert v.shape == (4, 8)
    torch.testing.assert_close(v.double(), (mean / mean.norm()).expand(4, 8), rtol=1e-5, atol=1e-6)


def test_state_names_types_and_files_are_as_before() -> None:
    model, reference = LLAMA.build(), LLAMA.build()
    parameters = dict(model.named_parameters())
    batch = LLAMA.batch(2, 12)
    velora_fx.apply(model, tightest(model, batch), batch)
    assert type(model) is type(reference)
    assert list(model.state_dict()) == list(reference.state_dict())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_save_pretrained_and_generate_work_as_before(tmp_path: Any) -> None:
    model, reference = LLAMA.build(), LLAMA.build()
    batch = LLAMA.batch(2, 12)
    velora_fx.apply(model, tightest(model, batch), batch)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), reference.parameters(), strict=True))
    model.eval()
    reference.eval()
    prompt = batch["input_ids"][:, :4]
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(prompt, **options), reference.generate(prompt, **options))


def test_signatures_are_kept() -> None:
    import inspect

    model = compressed(stack(), rows())
    assert inspect.signature(model.blocks[0].forward) == inspect.signature(stack().blocks[0].forward)
    lazy = velora_fx.optimize(stack(), 1)
    assert inspect.signature(lazy.forward) == inspect.signature(stack().forward)


def test_a_model_that_is_already_fake_keeps_its_weights() -> None:
    fake = fake_copy(stack(), fake_mode())
    assert velora_fx.plan(fake, 1, (rows(),)) == velora_fx.plan(stack(), 1, (rows(),))
