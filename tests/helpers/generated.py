"""Blocks put together by chance from what ordinary models are made of."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

WIDTH = 64  # also the length, so that a transposed input has the same width


class Linear(nn.Module):
    """A linear whose result may be written in place."""

    def __init__(self, chance: random.Random, width: int = WIDTH) -> None:
        super().__init__()
        self.linear = nn.Linear(width, WIDTH, bias=chance.random() < 0.5)
        self.after = chance.choice([None, nn.ReLU(), nn.ReLU(inplace=True), nn.SiLU(inplace=True), "scale", "slice"])

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        if self.after == "scale":
            h *= 0.5
        elif self.after == "slice":
            h[..., : WIDTH // 2] *= 0.5
        elif isinstance(self.after, nn.Module):
            h = self.after(h)
        return h  # type: ignore[no-any-return]


class Views(nn.Module):
    """Three linears that read one storage: as it is, transposed, and a slice of it."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.whole, self.transposed = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.part = nn.Linear(WIDTH // 2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        part = self.part(x[..., : WIDTH // 2])
        return self.whole(x) + self.transposed(x.transpose(-1, -2)).transpose(-1, -2) + part  # type: ignore[no-any-return]


class Modulated(nn.Module):
    """A norm that is scaled and shifted by what a linear makes of the input."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.condition, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.condition(F.silu(x.mean(-2, keepdim=True))).chunk(2, dim=-1)
        return self.out(F.layer_norm(x, (WIDTH,)) * (1 + scale) + shift)  # type: ignore[no-any-return]


class Gated(nn.Module):
    """Half of an input gates the other half."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(value * F.gelu(gate))  # type: ignore[no-any-return]


class Nested(nn.Module):
    """Layers in lists within lists, which are iterated and never called."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        pairs = (nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), Linear(chance)]) for _ in range(2))
        self.pairs = nn.ModuleList(pairs)

    def forward(self, x: Tensor) -> Tensor:
        first: Any
        second: Any
        for first, second in self.pairs:
            for layer in first:
                x = layer(x)
            x = x + second(x)
        return x


PARTS: tuple[Callable[[random.Random], nn.Module], ...] = (
    Linear, Views, Modulated, Gated, Nested, lambda chance: nn.LayerNorm(WIDTH), lambda chance: nn.Dropout(0.1),
)  # fmt: skip


class Block(nn.Module):
    """A few parts, some of them around a residual connection."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        chance = random.Random(seed)
        self.parts = nn.ModuleList(chance.choice(PARTS)(chance) for _ in range(chance.randint(2, 4)))
        self.last = Linear(chance)
        self.residual = [chance.random() < 0.5 for _ in self.parts]

    def forward(self, x: Tensor) -> Tensor:
        for part, is_residual in zip(self.parts, self.residual, strict=True):
            x = x + part(x) if is_residual else part(x)
        return x + self.last(x)  # type: ignore[no-any-return]


class Generated(nn.Module):
    """Two equal blocks, in a list or a list of lists, and a head whose result is written in place."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        blocks = [Block(seed), Block(seed)]
        self.is_nested = random.Random(seed).random() < 0.5
        self.blocks = nn.ModuleList(nn.ModuleList([block]) if self.is_nested else block for block in blocks)
        self.head = nn.Linear(WIDTH, 8)
        self.is_checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        for item in self.blocks:
            block: Any = item[0] if self.is_nested else item  # type: ignore[index]
            x = checkpoint(block, x, use_reentrant=False) if self.is_checkpointed else block(x)
        y = self.head(x)
        y /= 2
        return y.square().mean()  # type: ignore[no-any-return]


def generated(seed: int) -> Generated:
    """The model of this seed, in training mode."""
    return Generated(seed).train()


def batch() -> dict[str, Tensor]:
    """What it is called with."""
    return {"x": torch.randn(4, WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))}
