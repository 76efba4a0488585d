"""Hugging Face's Trainer: call `optimize` before `train`; planning happens at the first training forward."""

import tempfile

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import velora_fx


class Texts(Dataset[dict[str, torch.Tensor]]):
    """Sixty-four made-up texts of 128 words, in each of which a word follows from the one before."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(128) + 37 * number) % 256
        return {"input_ids": tokens, "labels": tokens}


torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=4, use_cache=False
)
model = LlamaForCausalLM(config)
velora_fx.optimize(model, budget_gb=0.07)  # no example inputs: the Trainer's own first batch is planned for
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder, max_steps=8, per_device_train_batch_size=16, learning_rate=1e-3, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Texts())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

plan = velora_fx.plan_of(model)
print(plan)
print(f"gradients of {sum(len(each.consumers) for each in plan.compressed)} weights are approximate")
print(f"loss {float(losses[0]):.3f} -> {float(losses[-1]):.3f}")
