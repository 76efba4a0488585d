"""Factored gradients: gradient and optimizer state of each compressed weight are M times smaller, exactly."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import velora_fx

MIB = 2**20
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4, use_cache=False
)
model = LlamaForCausalLM(config).train()
names = list(model.state_dict())
tokens = (torch.randint(256, (4, 1)) + torch.arange(64)) % 256
batch = {"input_ids": tokens, "labels": tokens}

untouched = velora_fx.plan(model, None, batch).baseline.peak_bytes
velora_fx.optimize(model, 0.75 * untouched / 2**30, batch, gradients="factored")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # after optimize: it has to hold the carriers


def step() -> float:
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


first = step()
with velora_fx.measure(model):
    second = step()
last = [step() for _ in range(8)][-1]
plan = velora_fx.plan_of(model)
assert plan.measured is not None
assert list(model.state_dict()) == names  # carriers are no part of a checkpoint
carriers = {name: p for name, p in model.named_parameters() if name.endswith("_carrier")}
weights = [model.get_parameter(name.removesuffix("_carrier")) for name in carriers]
ratio = sum(weight.numel() for weight in weights) / sum(carrier.numel() for carrier in carriers.values())
peaks = (untouched, plan.planned.peak_bytes, plan.measured.allocated_bytes)
print(f"gradients and AdamW's moments of {len(carriers)} weights are {ratio:.1f} times smaller")
print(f"loss {first:.3f} -> {last:.3f}")
print("peak: untouched {:.2f} MiB, predicted {:.2f} MiB, measured {:.2f} MiB".format(*(p / MIB for p in peaks)))
