"""LoRA by PEFT: the adapters' inputs are compressed, whose gradients become approximate; the base model is frozen."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import velora_fx

MIB = 2**20
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4, use_cache=False
)
linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
adapters = LoraConfig(r=8, target_modules=linears, task_type="CAUSAL_LM")
model = get_peft_model(LlamaForCausalLM(config), adapters).train()
tokens = (torch.randint(256, (16, 1)) + torch.arange(128)) % 256
batch = {"input_ids": tokens, "labels": tokens}

untouched = velora_fx.plan(model, None, batch).baseline.peak_bytes
velora_fx.optimize(model, 0.9 * untouched / 2**30, batch)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


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
names = [name for each in plan.compressed for name in each.consumers]
peaks = (untouched, plan.planned.peak_bytes, plan.measured.allocated_bytes)
print(f"gradients of {len(names)} weights are approximate, for example of {names[0]}")
print(f"loss {first:.3f} -> {last:.3f}")
print("peak: untouched {:.2f} MiB, predicted {:.2f} MiB, measured {:.2f} MiB".format(*(p / MIB for p in peaks)))
