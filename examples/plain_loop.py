"""A loop of plain PyTorch with the loss outside of the model: one call makes its step fit a memory budget."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import velora_fx

WORDS, WIDTH, HEADS, LAYERS, MIB = 256, 128, 4, 4, 2**20


class Block(nn.Module):
    """A transformer block as one writes it by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(WORDS, WIDTH), *(Block() for _ in range(LAYERS)), nn.Linear(WIDTH, WORDS))
text = (torch.randint(WORDS, (16, 1)) + torch.arange(129)) % WORDS  # each word follows from the one before
words, targets = text[:, :-1], text[:, 1:]


def loss_of(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


untouched = velora_fx.plan(model, None, (words,), loss_fn=loss_of).baseline.peak_bytes
velora_fx.optimize(model, 0.85 * untouched / 2**30, (words,), loss_fn=loss_of)
print(velora_fx.plan_of(model))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)


def step() -> float:
    loss = loss_of(model(words))
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
peaks = (untouched, plan.planned.peak_bytes, plan.measured.allocated_bytes)
print(f"loss {first:.3f} -> {last:.3f}")
print("peak: untouched {:.2f} MiB, predicted {:.2f} MiB, measured {:.2f} MiB".format(*(p / MIB for p in peaks)))
