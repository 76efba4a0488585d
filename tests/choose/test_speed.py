"""Plans for speed: compression wherever the predicted time of a step falls, with sub-tokens that are nearly free."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import velora_fx
from tests.helpers.gradients import tightest
from velora_fx import devices
from velora_fx.analyse import Actions, analyse
from velora_fx.choose.speed import faster, saved_seconds
from velora_fx.options import Options


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
def plan() -> velora_fx.Plan:
    model, batch = wide_llama()
    return velora_fx.plan(model, None, batch, objective="speed")


def test_a_step_planned_for_speed_is_faster_with_sub_tokens_that_are_nearly_free(plan):
    assert plan.planned.step_seconds < plan.baseline.step_seconds
    assert plan.largest_sub_token == 8
    assert "objective       speed" in str(plan)
    assert velora_fx.Plan.from_json(plan.to_json()).objective == "speed"


def test_speed_compresses_inputs_that_free_nothing_and_memory_does_not(plan):
    model, batch = wide_llama()
    in_speed = {name for decision in plan.compressed for name in decision.consumers}
    with pytest.raises(velora_fx.BudgetError) as caught:
        velora_fx.plan(model, 1e-6, batch, method="compress")
    in_memory = {name for decision in caught.value.plan.compressed for name in decision.consumers}
    assert in_speed - in_memory == {f"model.layers.{layer}.self_attn.o_proj" for layer in range(2)}
    assert not {skipped.module for skipped in plan.skipped} & in_speed


@pytest.mark.slow
def test_a_plan_for_speed_fits_its_budget_too():
    model, batch = wide_llama()
    tight = tightest(model, batch, optimizer="adamw")
    budget_gb = (tight.baseline.peak_bytes + tight.planned.peak_bytes) / 2 / 2**30
    memory = velora_fx.plan(model, budget_gb, batch, method="compress")
    speed = velora_fx.plan(model, budget_gb, batch, objective="speed", method="compress")
    assert speed.fits and speed.planned.step_seconds < memory.planned.step_seconds


def test_one_of_several_readers_of_an_input_can_be_compressed_and_its_plan_applied_again():
    """The paper compresses v and down: q and k keep the input that v reads, so for v only time is saved."""
    model, batch = wide_llama()
    names = ("v_proj", "down_proj")
    before = model(**batch).loss
    before.backward()
    dense = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    velora_fx.optimize(model, None, batch, objective="speed", filter_fn=lambda module, name: name.endswith(names))
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
    velora_fx.apply(model, plan, batch)
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, first[name])


def test_speed_needs_no_budget_before_the_first_forward():
    model, batch = wide_llama()
    velora_fx.optimize(model, objective="speed")
    model(**batch).loss.backward()
    assert velora_fx.plan_of(model).objective == "speed" and velora_fx.plan_of(model).compressed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "fast"}, "objective must be 'memory' or 'speed', got 'fast'"),
        ({"objective": "speed", "method": "exact"}, "method='exact' never compresses"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        velora_fx.plan(nn.Linear(8, 8), 1.0, (torch.ones(2, 8),), **options)


def test_a_linear_that_is_a_region_of_its_own_is_compressed_for_speed_too():
    """The first linear's input is the model's own, which the caller holds: to compress it saves time alone."""
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    plan = velora_fx.plan(model, None, (torch.randn(512, 256),), objective="speed")
    assert {name for decision in plan.compressed for name in decision.consumers} == {"0", "2"}


def test_wanted_sizes_are_taken_for_an_input_that_frees_nothing():
    model, batch = nn.Linear(256, 256), (torch.randn(512, 256),)
    plan = velora_fx.plan(model, None, batch, objective="speed", sub_token_sizes=(32,))
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


def test_what_a_simulation_does_not_confirm_is_not_done():
    model, batch = wide_llama()
    analysis = analyse(model, (), batch, Options(), torch.device("cpu"), lambda message: None)
    nothing = Actions(), analysis.baseline
    assert faster(analysis, *nothing, None, 8)[0].sizes
    assert faster(analysis, *nothing, 1, 8) == nothing  # above the budget
    slow = replace(analysis, simulate=lambda actions, joined: replace(analysis.simulate(actions), seconds=math.inf))
    assert faster(slow, *nothing, None, 8) == nothing
