"""Trainers that put another forward in the place of the model's: SFTTrainer does, with and without adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import velora_fx
from tests.helpers.gradients import compressed_weights

datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
TEXTS = torch.randint(0, 64, (16, 32), generator=torch.Generator().manual_seed(1))
LINEARS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, use_cache=False
    )  # fmt: skip
    return LlamaForCausalLM(config)


def trainer(model: Any, folder: Path, peft_config: LoraConfig | None = None, **options: Any) -> Any:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<pad>": 2, "</s>": 3}, unk_token="a"))
    arguments = trl.SFTConfig(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1,
        report_to=[], use_cpu=True, save_strategy="no", gradient_checkpointing=False, max_length=32,
        disable_tqdm=True, **{"bf16": False, **options},
    )  # fmt: skip
    return trl.SFTTrainer(
        model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"input_ids": TEXTS.tolist()}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>"),
        peft_config=copy.deepcopy(peft_config),
    )


def losses(trained: Any) -> list[float]:
    trained.train()
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def optimized(order: str, folder: Path, *args: Any, optimize: Any, **options: Any) -> Any:
    """A trainer whose model is optimised before it is made, or afterwards."""
    model = llama()
    if order == "before the trainer":
        optimize(model)
    made = trainer(model, folder, *args, **options)
    if order == "after the trainer":
        optimize(made.model)
    return made


def tightest_of(order: str, folder: Path, *args: Any, **options: Any) -> velora_fx.Plan:
    """The plan that compresses everything in the trainer's own step."""
    made = optimized(
        order, folder, *args, optimize=lambda model: velora_fx.optimize(model, 1e-9, method="compress"), **options
    )
    with pytest.raises(velora_fx.BudgetError) as raised:
        made.train()
    return raised.value.plan


@pytest.mark.parametrize(
    "mixed", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["float32", "mixed precision"]
)
@pytest.mark.parametrize("order", [pytest.param("before the trainer", marks=pytest.mark.slow), "after the trainer"])
def test_a_model_is_planned_for_what_the_trainer_has_it_run(tmp_path: Path, order: str, mixed: bool) -> None:
    plan, expected = tightest_of(order, tmp_path, bf16=mixed), losses(trainer(llama(), tmp_path, bf16=mixed))
    trained = optimized(order, tmp_path, bf16=mixed, optimize=lambda model: velora_fx.apply(model, plan))
    found = losses(trained)
    assert found[0] == expected[0] != found[-1]
    assert velora_fx.plan_of(trained.model).compressed == plan.compressed
    assert len(compressed_weights(trained.model)) == 3 * len(LINEARS)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["before the trainer", "after the trainer"])
def test_adapters_that_the_trainer_adds_are_planned_for(tmp_path: Path, order: str) -> None:
    adapters = LoraConfig(r=8, target_modules=LINEARS, task_type="CAUSAL_LM")
    plan, expected = tightest_of(order, tmp_path, adapters), losses(trainer(llama(), tmp_path, adapters))
    trained = optimized(order, tmp_path, adapters, optimize=lambda model: velora_fx.apply(model, plan))
    found = losses(trained)
    assert found[0] == expected[0] != found[-1]
    assert velora_fx.plan_of(trained.model).compressed
    assert "lora_A" in {name.split(".")[-3] for name in compressed_weights(trained.model)}
