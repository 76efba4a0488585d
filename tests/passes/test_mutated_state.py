"""Buffers and parameters that a forward writes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.helpers.graph_text import prepared
from velora_fx.passes.mutated_state import mutated_state


class Writing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("table", torch.zeros(2, 4))
        self.register_buffer("read", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        self.table[0].copy_(x.detach().mean(0))
        h = self.linear(x) + self.read
        return h.clone().mul_(2)


def test_writes_to_buffers_and_to_their_views_are_found_and_others_are_not() -> None:
    assert set(mutated_state(prepared(Writing(), torch.randn(3, 4)))) == {"count", "table"}


def test_a_batch_norm_writes_its_statistics() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert "1.running_mean" in mutated_state(prepared(model, torch.randn(3, 4)))


def test_what_a_result_is_written_into_by_name_is_found() -> None:
    class Normalising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("direction", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                nn.functional.normalize(self.direction * 2, dim=0, out=self.direction)
            return x * self.direction.clone()

    assert mutated_state(prepared(Normalising(), torch.randn(3, 4))) == ("direction",)


def test_a_forward_without_writes_has_none() -> None:
    assert mutated_state(prepared(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(3, 4))) == ()
