"""Predicted peaks against the real CPU allocator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import velora_fx
from tests.helpers.allocator import peak_of
from tests.helpers.gradients import tightest
from tests.helpers.peaks import tensor_bytes
from tests.helpers.toys import Block, rows, stack


def llama() -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=128))


def gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=128, bos_token_id=0, eos_token_id=0)
    )


def bert() -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    return hf.BertForSequenceClassification(hf.BertConfig(**sizes, vocab_size=128))


def batch_of(model: nn.Module) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 128, (8, 256), generator=torch.Generator().manual_seed(0))
    is_classifier = isinstance(model, hf.BertForSequenceClassification)
    return {"input_ids": ids, "labels": torch.zeros(8, dtype=torch.long) if is_classifier else ids}


def measured_peak(
    model: nn.Module, batch: dict[str, torch.Tensor], autocast: bool = False, accumulates: bool = False
) -> int:
    """Peak bytes of the second training step on the real allocator; with `accumulates` of its second batch."""
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()

    step()
    optimizer.zero_grad()
    if accumulates:
        model(**batch).loss.backward()
    states = [value for state in optimizer.state.values() for value in state.values()]
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    before = tensor_bytes([*model.parameters(), *model.buffers(), *gradients, *states, *batch.values()])
    return before + peak_of(step)


@pytest.fixture(
    scope="module",
    params=[llama, *(pytest.param(make, marks=pytest.mark.slow) for make in (gpt2, bert))],
    ids=lambda make: make.__name__,
)
def ends(request: pytest.FixtureRequest) -> tuple[Any, velora_fx.Plan]:
    torch.manual_seed(0)
    model = request.param().train()
    return request.param, tightest(model, batch_of(model), optimizer="adamw")


def test_activations_dominate_these_models(ends: tuple[Any, velora_fx.Plan]) -> None:
    baseline = ends[1].baseline
    assert baseline.breakdown["activations"] > 4 * baseline.breakdown["parameters"]


@pytest.mark.parametrize("share", [0.5, *(pytest.param(s, marks=pytest.mark.slow) for s in (0.0, 0.25, 0.75, 1.0))])
def test_the_predicted_peak_is_the_allocators_and_within_the_budget(
    ends: tuple[Any, velora_fx.Plan], share: float
) -> None:
    make, tight = ends
    smallest, baseline = tight.planned.peak_bytes, tight.baseline.peak_bytes
    budget = smallest + share * (baseline - smallest)
    torch.manual_seed(0)
    model = make().train()
    velora_fx.optimize(model, (budget + 1) / 2**30, batch_of(model), method="compress")
    plan = velora_fx.plan_of(model)
    measured = measured_peak(model, batch_of(model))
    assert bool(plan.compressed) == (share < 1)
    assert abs(plan.planned.peak_bytes - measured) <= 0.05 * measured
    assert measured <= budget * 1.002
    assert plan.planned.peak_bytes < baseline or share == 1


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_gradients_that_are_accumulated_are_there_from_the_start(
    ends: tuple[Any, velora_fx.Plan], share: float
) -> None:
    make, tight = ends
    torch.manual_seed(0)
    model = make().train()
    alone = tight.planned.peak_bytes + share * (tight.baseline.peak_bytes - tight.planned.peak_bytes)
    held = tensor_bytes(model.parameters())
    velora_fx.optimize(model, (alone + held + 1) / 2**30, batch_of(model), gradient_accumulation=2, method="compress")
    plan = velora_fx.plan_of(model)
    measured = measured_peak(model, batch_of(model), accumulates=True)
    assert plan.planned.breakdown["gradients"] == held
    assert bool(plan.compressed) == (share < 1)
    assert abs(plan.planned.peak_bytes - measured) <= 0.02 * measured


@pytest.mark.slow
def test_autocasts_copies_of_activations_and_weights_are_counted() -> None:
    torch.manual_seed(0)
    model = llama().train()
    batch = batch_of(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tight = tightest(model, batch, optimizer="adamw")
        budget = (tight.planned.peak_bytes + tight.baseline.peak_bytes) / 2
        velora_fx.optimize(model, budget / 2**30, batch, method="compress")
    plan = velora_fx.plan_of(model)
    measured = measured_peak(model, batch, autocast=True)
    assert plan.compressed
    assert abs(plan.planned.peak_bytes - measured) <= 0.05 * measured
    consumers = {decision.consumers for decision in plan.decisions}
    assert ("model.layers.0.self_attn.q_proj",) in consumers  # each linear saves a cast copy of its own


@pytest.mark.slow
def test_the_o_proj_input_is_reported_as_saved_by_attention_and_is_a_candidate_under_attention_dropout_on_cpu() -> None:
    model = llama().train()
    reasons = {
        skipped.module: skipped.reason for skipped in tightest(model, batch_of(model), optimizer="adamw").skipped
    }
    assert reasons["model.layers.0.self_attn.o_proj"] == "input also saved by attention"
    model = bert().train()
    consumers = {
        c for decision in tightest(model, batch_of(model), optimizer="adamw").decisions for c in decision.consumers
    }
    assert "bert.encoder.layer.0.attention.output.dense" in consumers


@pytest.mark.slow
def test_checkpointed_blocks_planned_for_cuda_without_a_gpu_recompute_attention_as_one_operator() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    model = bert().train()
    model.gradient_checkpointing_enable()
    cpu, cuda = (velora_fx.plan(model, None, batch_of(model), device=device) for device in ("cpu", "cuda"))
    scores = 8 * 4 * 256 * 256 * 4  # a recomputed block keeps three of them on the CPU, where dropout takes it apart
    assert cpu.baseline.peak_bytes - cuda.baseline.tensor_bytes > 2 * scores


class Recomputed(Block):
    """Recomputes itself in backward, in its own forward."""

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)  # type: ignore[no-any-return]


def test_a_block_that_checkpoints_itself_is_never_made_larger() -> None:
    model = stack()
    model.blocks = nn.ModuleList(Recomputed() for _ in range(4))
    plan = tightest(model, (rows(64, 64),), optimizer="sgd")
    untouched = tightest(stack(num_blocks=4), (rows(64, 64),), optimizer="sgd").baseline
    assert plan.planned.peak_bytes <= plan.baseline.peak_bytes < untouched.peak_bytes


def test_at_the_optimizer_step_the_report_says_that_activations_do_not_matter() -> None:
    model = llama().train()
    batch = {name: value[:1, :8] for name, value in batch_of(model).items()}
    plan = tightest(model, batch, optimizer="adamw")
    assert plan.planned.moment == "optimizer step"
    assert "compressing activations does not lower it" in str(plan)


def test_planning_for_cuda_without_a_gpu_takes_attention_as_one_operator() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    model = bert().train()
    cpu = tightest(model, batch_of(model), optimizer="adamw")
    cuda = tightest(model, batch_of(model), device="cuda", optimizer="adamw")
    scores = 8 * 4 * 256 * 256 * 4  # one [B, H, T, T] tensor, which attention with dropout keeps on the CPU
    assert cpu.baseline.breakdown["activations"] - cuda.baseline.breakdown["activations"] > 3 * scores
    assert cuda.overhead_bytes > 0 == cpu.overhead_bytes
    reasons = {skipped.module: skipped.reason for skipped in cuda.skipped}
    assert reasons["bert.encoder.layer.0.attention.output.dense"] == "input also saved by attention"
