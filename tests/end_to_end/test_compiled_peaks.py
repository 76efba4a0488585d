"""Compiled plans against the real allocator where a compiler does what blocks apart do not show."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.peaks import measured_peak, predict
from velora_fx.analyse import Actions
from velora_fx.choose.search import Search

WITHIN = 0.01


class Mlp(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))  # type: ignore[no-any-return]


class Calls(nn.Module):
    """Blocks that are called in an order that is given, one of them perhaps twice."""

    def __init__(self, order: Sequence[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mlp() for _ in range(max(order) + 1))
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        for number in self.order:
            x = self.blocks[number](x)
        return x.square().mean()


class Attending(nn.Module):
    """A block as torchvision's vision transformers have it."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln_1(x)
        x = x + self.self_attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class Vision(nn.Module):
    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, 64, 8, 8)
        self.class_token = nn.Parameter(torch.zeros(1, 1, 64))
        self.pos_embedding = nn.Parameter(torch.empty(1, 17, 64).normal_(std=0.02))
        self.layers = nn.Sequential(*(Attending() for _ in range(num_blocks)))
        self.ln, self.head = nn.LayerNorm(64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.pos_embedding
        return self.head(self.ln(self.layers(x))[:, 0]).square().mean()  # type: ignore[no-any-return]


def off(model: nn.Module, x: Tensor) -> list[float]:
    """How far the predicted peaks are off, untouched and with everything compressed."""
    batch = {"x": x}
    predicted = predict(model, batch, compiled=True, loss_fn=lambda output: output)
    pairs = (predicted.untouched_bytes, model), (predicted.compressed_bytes, predicted.compressed)
    return [abs(num_bytes / measured_peak(made, batch, "inductor") - 1) for num_bytes, made in pairs]


@pytest.mark.slow
@pytest.mark.parametrize("order", [(0, 0, 1, 2, 3), tuple(range(9))])
def test_of_some_blocks_the_compiled_peak_is_that_of_one_graph(order: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    assert max(off(Calls(order).train(), torch.randn(4, 64, 64))) <= WITHIN


@pytest.mark.slow
@pytest.mark.parametrize("num_blocks", [1, 2])
def test_a_compiled_vision_transformer_has_the_predicted_peak(num_blocks: int) -> None:
    torch.manual_seed(0)
    assert max(off(Vision(num_blocks).train(), torch.randn(8, 3, 32, 32))) <= WITHIN


@pytest.mark.slow
def test_where_blocks_are_searched_apart_the_plan_fits_as_one_graph() -> None:
    torch.manual_seed(0)
    predicted = predict(Calls(range(9)).train(), {"x": torch.randn(4, 64, 64)}, compiled=True)
    analysis = predicted.analysis
    budget = (predicted.untouched_bytes + predicted.compressed_bytes) // 2
    actions, peak = Search(analysis, compresses=True, recomputes=False).within(budget)
    assert actions != Actions()
    assert analysis.peak(actions).peak_bytes == peak.peak_bytes <= budget
