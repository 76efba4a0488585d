"""A compiled step: plan for torch.compile, then compile the same model."""

import contextlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import velora_fx

WORDS, WIDTH, HEADS, MIB = 256, 128, 4, 2**20


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Model(nn.Module):
    """A language model with its loss, which is compiled with the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(WORDS, WIDTH), Block(), Block(), nn.Linear(WIDTH, WORDS))

    def forward(self, words: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.layers(words).flatten(0, 1), targets.flatten())


torch.manual_seed(0)
model = Model()
words = (torch.randint(WORDS, (16, 1)) + torch.arange(128)) % WORDS  # each word follows from the one before
batch = (words, (words + 1) % WORDS)
velora_fx.optimize(model, 37 / 1024, batch, compiled=True)  # 37 MiB
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
run = torch.compile(model)  # after optimize: the compiler sees the rewritten graphs


losses = []
for number in range(10):
    with velora_fx.measure(model) if number == 1 else contextlib.nullcontext():
        loss = run(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    losses.append(loss.item())
plan = velora_fx.plan_of(model)
assert plan.measured is not None
peaks = (plan.baseline.peak_bytes, plan.planned.peak_bytes, plan.measured.allocated_bytes)
print(f"{plan}\nloss {losses[0]:.3f} -> {losses[-1]:.3f}")
print("peak: untouched {:.2f} MiB, predicted {:.2f} MiB, measured {:.2f} MiB".format(*(p / MIB for p in peaks)))
