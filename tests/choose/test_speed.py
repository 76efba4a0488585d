"""Plans for speed: compression wherever the predicted time of a step falls, within the approximation allowed."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import velora_fx
from tests.helpers.toys import AfterBlocks, rows, stack
from velora_fx import devices
from velora_fx.analyse import Actions, analyse
from velora_fx.choose.speed import Kind, choose_sizes, faster, saved_seconds
from velora_fx.options import Options

few = settings(max_examples=60, deadline=None, derandomize=True)


def wide_llama() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A Llama wide enough for its matrix products to cost more than their launches, and a batch."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=64,
        use_cache=False,
    )
    ids = torch.randint(0, 64, (2, 128))
    return transformers.LlamaForCausalLM(config).train(), {"input_ids": ids, "labels": ids}


@pytest.fixture(scope="module")
def plans() -> dict[float, velora_fx.Plan]:
    model, batch = wide_llama()
    return {a: velora_fx.plan(model, None, batch, objective="speed", max_approximation=a) for a in (0.3, 2.0, 5.0, 7.0)}


def test_a_step_planned_for_speed_is_faster_and_within_the_approximation_allowed(plans):
    for most, plan in plans.items():
        assert plan.planned.step_seconds < plan.baseline.step_seconds
        assert 0 < plan.approximation <= most


def test_more_approximation_never_makes_the_step_slower(plans):
    times = [plans[most].planned.step_seconds for most in sorted(plans)]
    assert times == sorted(times, reverse=True)


def test_the_approximation_is_the_mean_log2_of_the_sizes_over_the_weights(plans):
    model, _ = wide_llama()
    weights = {name.removesuffix(".weight"): p.numel() for name, p in model.named_parameters() if "proj" in name}
    for plan in plans.values():
        halvings = {n: math.log2(d.sub_token_size) for d in plan.compressed for n in d.consumers}
        assert plan.approximation == pytest.approx(
            sum(weights[n] * halvings.get(n, 0.0) for n in weights) / sum(weights.values())
        )


def test_speed_compresses_inputs_that_free_nothing_and_memory_does_not(plans):
    model, batch = wide_llama()
    in_speed = {name for decision in plans[5.0].compressed for name in decision.consumers}
    with pytest.raises(velora_fx.BudgetError) as caught:
        velora_fx.plan(model, 1e-6, batch)
    in_memory = {name for decision in caught.value.plan.compressed for name in decision.consumers}
    assert in_speed - in_memory == {f"model.layers.{layer}.self_attn.o_proj" for layer in range(2)}
    assert not {skipped.module for skipped in plans[5.0].skipped} & in_speed


@pytest.mark.slow
def test_a_plan_for_speed_fits_its_budget_too():
    model, batch = wide_llama()
    whole = velora_fx.plan(model, None, batch).baseline.peak_bytes
    with pytest.raises(velora_fx.BudgetError) as caught:
        velora_fx.plan(model, 1e-6, batch)
    budget_gb = (whole + caught.value.smallest_peak_bytes) / 2 / 2**30
    memory = velora_fx.plan(model, budget_gb, batch)
    speed = velora_fx.plan(model, budget_gb, batch, objective="speed", max_approximation=5)
    assert speed.fits and speed.planned.step_seconds < memory.planned.step_seconds
    message = r"within \d.* MiB the least approximation is [\d.]+, and max_approximation is 0.001: allow more"
    with pytest.raises(velora_fx.BudgetError, match=message) as caught:
        velora_fx.plan(model, budget_gb, batch, objective="speed", max_approximation=1e-3)
    plan = caught.value.plan
    assert not plan.fits and plan.planned == memory.planned and plan.max_approximation == 1e-3
    assert "verdict         TOO APPROXIMATE" in str(plan)
    velora_fx.optimize(model, plan=plan, example_inputs=batch)


def test_one_of_several_readers_of_an_input_can_be_compressed_and_its_plan_applied_again():
    """The paper compresses v and down: q and k keep the input that v reads, so for v only time is saved."""
    model, batch = wide_llama()
    names = ("v_proj", "down_proj")
    before = model(**batch).loss
    before.backward()
    dense = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    velora_fx.optimize(
        model, None, batch, objective="speed", max_approximation=5, filter_fn=lambda module, name: name.endswith(names)
    )
    plan = velora_fx.plan_of(model)
    compressed = {name for decision in plan.compressed for name in decision.consumers}
    assert {name.rpartition(".")[2] for name in compressed} == set(names)
    loss = model(**batch).loss
    loss.backward()
    assert torch.equal(loss, before)
    first = {name: p.grad.clone() for name, p in model.named_parameters()}
    for name, gradient in first.items():
        is_approximate = name.removesuffix(".weight") in compressed
        assert torch.allclose(gradient, dense[name], rtol=1e-4, atol=1e-6) != is_approximate, name
    model.zero_grad()
    velora_fx.optimize(model, plan=plan, example_inputs=batch)
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, first[name])


def test_speed_needs_no_budget_before_the_first_forward():
    model, batch = wide_llama()
    velora_fx.optimize(model, objective="speed", max_approximation=5)
    model(**batch).loss.backward()
    assert velora_fx.plan_of(model).objective == "speed" and velora_fx.plan_of(model).compressed


def test_a_plan_for_speed_survives_json(plans):
    again = velora_fx.Plan.from_json(plans[2.0].to_json())
    assert (again.objective, again.approximation) == ("speed", plans[2.0].approximation)


def test_the_report_tells_the_approximation(plans):
    assert f"speed: approximation {plans[5.0].approximation:.2f}" in str(plans[5.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "speed"}, "objective='speed' goes with max_approximation"),
        ({"max_approximation": 5}, "objective='speed' goes with max_approximation"),
        ({"objective": "fast", "max_approximation": 5}, "objective must be 'memory' or 'speed', got 'fast'"),
        ({"objective": "speed", "max_approximation": -1}, "must be a positive number such as 5, got -1"),
        ({"objective": "speed", "max_approximation": True}, "must be a positive number such as 5, got True"),
        ({"objective": "speed", "max_approximation": math.inf}, "must be a positive number such as 5, got inf"),
        ({"objective": "speed", "max_approximation": 5, "exact_only": True}, "exact_only never compresses"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        velora_fx.plan(nn.Linear(8, 8), 1.0, (torch.ones(2, 8),), **options)


def test_a_given_plan_takes_no_objective(plans):
    model, batch = wide_llama()
    with pytest.raises(ValueError, match="leave out objective"):
        velora_fx.optimize(model, plan=plans[5.0], example_inputs=batch, objective="speed", max_approximation=5)


kinds = st.lists(
    st.tuples(
        st.integers(1, 3),
        st.lists(st.tuples(st.integers(1, 9), st.integers(-3, 9)), min_size=1, max_size=2),
    ),
    min_size=1,
    max_size=3,
)


@few
@given(kinds, st.integers(0, 30))
def test_the_sizes_chosen_save_as_much_time_as_any_within_the_cost(drawn, max_cost):
    made = [
        Kind(
            keys=tuple((f"{index}", f"{number}") for number in range(count)),
            sizes=tuple(2 ** (level + 1) for level in range(len(levels))),
            costs=tuple(float(cost) for cost, _ in levels),
            seconds=tuple(float(seconds) for _, seconds in levels),
        )
        for index, (count, levels) in enumerate(drawn)
    ]
    members = [(kind, key) for kind in made for key in kind.keys]
    best = 0.0
    for levels in product(*(range(-1, len(kind.sizes)) for kind, _ in members)):
        pairs = [(kind, level) for (kind, _), level in zip(members, levels, strict=True) if level >= 0]
        if sum(kind.costs[level] for kind, level in pairs) <= max_cost:
            best = max(best, sum(kind.seconds[level] for kind, level in pairs))
    chosen = choose_sizes(made, float(max_cost))
    levels = [(kind, kind.sizes.index(chosen[key])) for kind, key in members if key in chosen]
    assert sum(kind.costs[level] for kind, level in levels) <= max_cost
    assert sum(kind.seconds[level] for kind, level in levels) == pytest.approx(best)


def test_a_linear_that_is_a_region_of_its_own_is_compressed_for_speed_too():
    """The first linear's input is the model's own, which the caller holds: to compress it saves time alone."""
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    plan = velora_fx.plan(model, None, (torch.randn(512, 256),), objective="speed", max_approximation=5)
    assert {name for decision in plan.compressed for name in decision.consumers} == {"0", "2"}


def test_wanted_sizes_are_taken_for_an_input_that_frees_nothing():
    model, batch = nn.Linear(256, 256), (torch.randn(512, 256),)
    plan = velora_fx.plan(model, None, batch, objective="speed", max_approximation=5, sub_token_sizes=(32,))
    assert [decision.sub_token_size for decision in plan.compressed] == [32]
    assert not velora_fx.plan(model, None, batch, sub_token_sizes=(32,)).compressed


class Readers(nn.Module):
    """Blocks that all read one memory, as the layers of a decoder read what the encoder made."""

    def __init__(self, num_blocks: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Reader(width) for _ in range(num_blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory = torch.tanh(x)
        for block in self.blocks:
            x = block(x, memory)
        return x.float().square().mean()


class Reader(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.k, self.v = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return x + self.k(memory) + self.v(memory)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_time_that_a_candidate_saves_is_what_a_simulation_shows(autocast, monkeypatch):
    gpu = next(gpu for gpu in devices.GPUS if gpu.name == "A100")
    monkeypatch.setattr(devices, "CPU", replace(gpu, launch_seconds=0.0))
    model, x = Readers(4, 512), torch.randn(2, 4096, 512)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        analysis = analyse(model, (x,), {}, Options(), torch.device("cpu"), lambda message: None)
        shared = [c for c in analysis.compressible if c.consumers[0].startswith("blocks.")]
        faster = analysis.peak(Actions({candidate.key: 32 for candidate in shared})).step_seconds
        predicted = sum(saved_seconds(analysis, candidate, 1, 32) for candidate in shared)
    assert {name for candidate in shared for name in candidate.consumers} == {
        f"blocks.{block}.{linear}" for block in range(4) for linear in "kv"
    }
    assert predicted == pytest.approx(analysis.baseline.step_seconds - faster, rel=0.2)


@pytest.mark.slow
def test_blocks_are_recomputed_where_what_compression_needs_is_not_allowed():
    """With `recompute` the cheapest plan may compress although recompute alone, which approximates nothing, fits."""
    model, batch = stack(width=64), (rows(64, 64, 64),)
    options = {"optimizer": "sgd", "recompute": True}
    with pytest.raises(velora_fx.BudgetError) as caught:
        velora_fx.plan(model, 1e-9, batch, optimizer="sgd", exact_only=True)
    smallest, untouched = caught.value.smallest_peak_bytes, caught.value.plan.baseline.peak_bytes
    budget_gb = (smallest + untouched) / 2**31
    assert velora_fx.plan(model, budget_gb, batch, **options).approximation > 1e-3
    plan = velora_fx.plan(model, budget_gb, batch, objective="speed", max_approximation=1e-3, **options)
    assert plan.fits and plan.recomputed and plan.approximation <= 1e-3


@pytest.mark.slow
def test_where_recompute_alone_is_not_enough_the_error_says_what_it_takes():
    torch.manual_seed(0)
    model, batch = AfterBlocks().train(), (rows(64, 64, 64),)
    smallest = []
    for options in ({"exact_only": True}, {"recompute": True}):
        with pytest.raises(velora_fx.BudgetError) as caught:
            velora_fx.plan(model, 1e-9, batch, optimizer="sgd", **options)
        smallest.append(caught.value.smallest_peak_bytes)
    assert smallest[1] < smallest[0]
    speed = {"objective": "speed", "max_approximation": 1e-3, "optimizer": "sgd", "recompute": True}
    with pytest.raises(velora_fx.BudgetError, match=r"and recompute alone takes .* at the least"):
        velora_fx.plan(model, sum(smallest) / 2**31, batch, **speed)


@pytest.mark.parametrize("short", [0.0, 1e-9, 1e-7, 1e-6, 1e-3])
def test_what_is_chosen_is_within_the_cost_to_the_last_digit(short):
    """The solver itself allows a relative excess of 1e-6."""
    kind = Kind((("", "a"), ("", "b"), ("", "c")), (16, 32), (4.0, 5.0), (3.0, 4.0))
    chosen = choose_sizes([kind], 15.0 - short)
    assert sum(math.log2(size) for size in chosen.values()) <= 15.0 - short
    assert sorted(chosen.values()) == ([32, 32, 32] if short == 0 else [16, 32, 32])


def test_what_a_simulation_does_not_confirm_is_not_done():
    model, batch = wide_llama()
    analysis = analyse(model, (), batch, Options(), torch.device("cpu"), lambda message: None)
    nothing = Actions(), analysis.baseline
    assert faster(analysis, *nothing, None, 5.0)[0].sizes
    assert faster(analysis, *nothing, 1, 5.0) == nothing  # above the budget
    slow = replace(analysis, simulate=lambda actions: replace(analysis.simulate(actions), seconds=math.inf))
    assert faster(slow, *nothing, None, 5.0) == nothing
