"""What ordinary models of others do and toys of our own did not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GptOssConfig, GptOssForCausalLM

import velora_fx
from tests.helpers.gradients import tightest
from tests.helpers.peaks import assert_predicted

X = torch.randn(8, 32, 64, generator=torch.Generator().manual_seed(0))


def test_experts_whose_products_are_written_in_place_can_be_planned_for_and_are_listed() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = GptOssForCausalLM(GptOssConfig(**sizes, **heads, use_cache=False)).train()
    ids = torch.randint(64, (4, 16))
    plan = tightest(model, {"input_ids": ids, "labels": ids})
    assert plan.compressed
    skipped = {item.module for item in plan.skipped}
    assert {f"model.layers.{n}.mlp.experts.{w}" for n in (0, 1) for w in ("gate_up_proj", "down_proj")} <= skipped


class Masking(nn.Module):
    """Puts a parameter where a mask is, as SpecAugment does."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(64))
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(x.shape[:2], dtype=torch.bool)
        mask[:, 2:9] = True
        h = self.first(x) * 2
        h[mask] = self.embedding
        return self.second(F.gelu(h)).square().mean()


def test_a_real_mask_among_indices_picks_what_it_picks() -> None:
    torch.manual_seed(0)
    assert_predicted(Masking().train(), {"x": X}, "eager")


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Quantised(nn.Module):
    """Multiplies with the weight of a linear that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(Straight.apply(x * 8) / 8, self.inner.weight, self.inner.bias)  # type: ignore[no-untyped-call]


class Rounding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(64), Quantised(), nn.Linear(64, 64)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()


def test_a_part_that_its_module_never_calls_is_listed() -> None:
    torch.manual_seed(0)
    plan = tightest(Rounding().train(), (X,))
    assert {"blocks.0.1.inner", "blocks.1.1.inner"} <= {item.module for item in plan.skipped}


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.gelu(self.used(x))
        return self.idle(h), h


def test_an_optimizer_holds_nothing_for_weights_that_no_loss_depends_on() -> None:
    torch.manual_seed(0)
    model = Idle().train()
    plan = velora_fx.plan(model, None, (X,), loss_fn=lambda output: output[1].square().mean())
    moments = 2 * sum(parameter.numel() * 4 for parameter in model.used.parameters())
    steps = 4 * len(list(model.used.parameters()))
    assert plan.baseline.breakdown["optimizer"] == moments + steps
