"""Modules that a model holds under several names: regions once, and exact wherever they are called."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import velora_fx
from tests.helpers.factored import assert_same_weights
from tests.helpers.gradients import assert_same_gradients, compressed_weights, step, tightest
from tests.helpers.peaks import assert_near, measured_peak
from tests.helpers.toys import rows

WIDTH = 64


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))  # type: ignore[no-any-return]


class Sharing(nn.Module):
    """Blocks, some of which, or parts of which, are held and called once more elsewhere."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks, shared = [Feed() for _ in range(3)], nn.Linear(WIDTH, WIDTH)
        self.calls: list[nn.Module] = [*blocks]
        if kind == "a block, held before":
            self.first = blocks[0]
        self.blocks = nn.ModuleList(blocks)
        if kind in ("a block, held before", "a block, held after"):
            self.last = blocks[0]
            self.calls += [self.last]
        elif kind == "two lists":
            self.after = nn.ModuleList([blocks[0], Feed()])
            self.calls += [*self.after]
        elif kind == "a part of a block":
            self.last = nn.Sequential(nn.Sequential(blocks[0].norm, blocks[0].up), nn.GELU())
            self.calls += [self.last]
        else:
            self.one, self.other = nn.Sequential(shared, nn.GELU()), nn.Sequential(shared, nn.GELU())
            self.calls += [self.one, self.other]

    def forward(self, x: Tensor) -> Tensor:
        for module in self.calls:
            x = module(x)
        return x.square().mean()


KINDS = ["a block, held before", "a block, held after", "two lists", "a part of a block", "a linear of two parents"]
X = rows(64, 64, WIDTH)


def scalar(loss: Tensor) -> Tensor:
    return loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["compress", "exact"])
def test_all_but_compressed_gradients_are_exact_and_the_peak_is_predicted(kind: str, method: str) -> None:
    reference, model = Sharing(kind).train(), Sharing(kind).train()
    plan = tightest(model, {"x": X}, method=method, optimizer="sgd")
    assert plan.compressed or plan.recomputed
    velora_fx.apply(model, plan, {"x": X})
    approximate = set(compressed_weights(model))
    assert torch.equal(step(model, {"x": X}, scalar), step(reference, {"x": X}, scalar))
    assert_same_gradients(model, reference, {name for name, _ in model.named_parameters()} - approximate)
    assert_near(plan.planned.peak_bytes, measured_peak(model, {"x": X}), "eager")


@pytest.mark.parametrize("kind", KINDS)
def test_factored_gradients_train_as_dense_ones_of_the_same_projections(kind: str) -> None:
    ours, dense = Sharing(kind).double().train(), Sharing(kind).double().train()
    batch, start = {"x": X.double()}, copy.deepcopy(dense)
    plan = tightest(ours, batch, gradients="factored")
    velora_fx.apply(ours, plan, batch)
    data: dict[str, Any] = plan.to_dict()
    velora_fx.apply(dense, velora_fx.Plan.from_dict({**data, "gradients": "dense"}), batch)
    for model in (ours, dense):
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            model(**batch).backward()
            optimizer.step()
    assert_same_weights(ours, dense, start)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_their_peak_is_predicted_too(kind: str) -> None:
    model = Sharing(kind).train()
    plan = tightest(model, {"x": X}, optimizer="sgd", compiled=True)
    assert plan.compressed
    velora_fx.apply(model, plan, {"x": X})
    assert_near(plan.planned.peak_bytes, measured_peak(model, {"x": X}, "inductor"), "inductor")
