"""Small models that show one behaviour each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import velora_fx
from tests.helpers.gradients import tightest


class Of(nn.Module):
    """A forward made of a function of the module and its inputs."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


class Block(nn.Module):
    """A residual MLP block whose dropout, mask and inner stretches can be chosen."""

    def __init__(self, width: int = 32, stretch: str = "") -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.1)
        self.stretch = stretch

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        h = self.norm(x)
        if self.stretch == "no_grad":
            with torch.no_grad():
                gate = torch.sigmoid(self.up(h).mean(-1, keepdim=True))
            h = h * gate
        if self.stretch == "autocast":
            with torch.autocast("cpu", enabled=False):
                h = self.norm(h.float()).to(h.dtype)
        if cache is not None:
            h = h + cache.update(h)
        y = self.down(F.gelu(self.up(h)))
        if mask is not None:
            y = y * mask
        return x + self.dropout(y)


class Stack(nn.Module):
    """Equal blocks and a head; the output is a scalar loss."""

    def __init__(self, num_blocks: int = 3, stretch: str = "", width: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, stretch) for _ in range(num_blocks))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        for block in self.blocks:
            x = block(x, mask, cache)
        return self.head(x).square().mean()  # type: ignore[no-any-return]


def stack(stretch: str = "", num_blocks: int = 3, width: int = 32) -> Stack:
    """A seeded `Stack`."""
    torch.manual_seed(0)
    return Stack(num_blocks, stretch, width).train()


def without_dropout(model: nn.Module) -> Any:
    """The model, whose masks Inductor draws otherwise than eager code, with none."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


class AfterBlocks(nn.Module):
    """Equal blocks, and then products that are no part of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(without_dropout(Block(64)) for _ in range(6)))
        self.wide = nn.ModuleDict({"up": nn.Linear(64, 1024), "same": nn.Linear(1024, 1024)})

    def forward(self, x: Tensor) -> Tensor:
        return self.wide["same"](self.wide["up"](self.blocks(x))).square().mean()  # type: ignore[no-any-return]


def rows(batch_size: int = 4, length: int = 8, width: int = 32) -> Tensor:
    """Seeded input of a `Stack`."""
    return torch.randn(batch_size, length, width, generator=torch.Generator().manual_seed(1))


def compressed(model: nn.Module, *args: Tensor, **options: Any) -> nn.Module:
    """The model with everything compressed that can be."""
    plan = tightest(model, args, **options)
    return velora_fx.apply(model, plan, args)


def compressed_stack(is_compiled: bool = False, has_dropout: bool = True) -> Any:
    """A `Stack` with everything compressed that can be, by a plan that is made once, of an eager step."""
    model = stack() if has_dropout else without_dropout(stack())
    return velora_fx.apply(model, replace(stack_plan(), compiled=is_compiled), (rows(),))


@cache
def stack_plan() -> velora_fx.Plan:
    """The tightest plan for a `Stack`."""
    return tightest(stack(), (rows(),))


class Elementwise(torch.optim.Optimizer):
    """An optimizer as third parties write them: `update` is called with each parameter and the options of its group."""

    def __init__(self, params: Any, lr: float = 1e-3, **options: Any) -> None:
        super().__init__(params, {"lr": lr, **options})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group)

    def update(self, p: Any, group: dict[str, Any]) -> None:
        raise NotImplementedError
