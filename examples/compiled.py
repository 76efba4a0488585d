"""A compiled step: plan for torch.compile, then compile the same model."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import velora_fx

WIDTH, HEADS, LAYERS, MIB = 128, 4, 2, 2**20


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
model = nn.Sequential(*(Block() for _ in range(LAYERS)))
x = torch.randn(16, 128, WIDTH)


def loss_of(output: Tensor) -> Tensor:
    return F.mse_loss(output, x.roll(1, dims=1))


velora_fx.optimize(model, 36 / 1024, (x,), loss_fn=loss_of, compiled=True)  # 36 MiB
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
run = torch.compile(model)  # after optimize: the compiler sees the rewritten graphs


def step() -> float:
    loss = loss_of(run(x))
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
peaks = (plan.baseline.peak_bytes, plan.planned.peak_bytes, plan.measured.allocated_bytes)
print(f"gradients of {sum(len(each.consumers) for each in plan.compressed)} weights are approximate")
print(f"loss {first:.3f} -> {last:.3f}")
print("peak: untouched {:.2f} MiB, predicted {:.2f} MiB, measured {:.2f} MiB".format(*(p / MIB for p in peaks)))
