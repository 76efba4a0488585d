"""FSDP2 on two ranks (gloo, on CPU): optimize the whole model on each rank, then shard it."""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from transformers import LlamaConfig, LlamaForCausalLM

import velora_fx

RANKS = 2
CONFIG = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, use_cache=False
)


def train(rank: int, store: str) -> None:
    """What each rank does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    torch.manual_seed(0)  # the same weights on each rank
    model = LlamaForCausalLM(CONFIG).train()
    tokens = (torch.randint(256, (RANKS, 8, 1)) + torch.arange(64))[rank] % 256  # another batch on each rank
    batch = {"input_ids": tokens, "labels": tokens}

    untouched = velora_fx.plan(model, None, batch).baseline.peak_bytes  # of the unsharded model
    velora_fx.optimize(model, 0.9 * untouched / 2**30, batch)  # the same projections on each rank, from the seed
    decision = velora_fx.plan_of(model).compressed[0]
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    losses = []
    for _ in range(6):
        loss = model(**batch).loss
        loss.backward()
        gradient = model.get_parameter(f"{decision.consumers[0]}.weight").grad
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert isinstance(gradient, DTensor) and decision.sub_token_size is not None
    shard = gradient.to_local().abs().unflatten(1, (-1, decision.sub_token_size))  # dW = A ⊗ signs / √M
    if rank == 0:
        print(f"equal within each sub-token of {decision.consumers[0]}: {bool((shard.std(-1) < 1e-6).all())}")
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        spawn(train, (str(Path(folder) / "store"),), nprocs=RANKS)
