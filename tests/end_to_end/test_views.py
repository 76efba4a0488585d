"""Views of one storage are inputs of their own, each with its projections; the storage is freed if all agree."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.gradients import (
    assert_same_gradients,
    compressed_weights,
    rebuilt_inputs,
    regions_of,
    step,
    tightest,
)
from tests.helpers.peaks import measured_peak, predict
from tests.helpers.toys import compressed

LENGTH, WIDTH = 16, 64


class Views(nn.Module):
    """A norm's output as it is, transposed and in part."""

    def __init__(self, part: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.whole, self.turned, self.part = nn.Linear(WIDTH, WIDTH), nn.Linear(LENGTH, LENGTH), nn.Linear(part, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        y = self.whole(h).sin() + self.turned(h.transpose(-1, -2)).transpose(-1, -2).sin()
        return x + y + self.part(h[..., : self.part.in_features]).sin()  # type: ignore[no-any-return]


class Again(nn.Module):
    """Equal views that different operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(WIDTH), nn.Linear(32, WIDTH), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.a(h[..., :32]).sin() + self.b(h[..., :32]).sin()  # type: ignore[no-any-return]


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x).square().mean()  # type: ignore[no-any-return]


def made(part: int = 32) -> tuple[Stack, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Stack(Views(part), Views(part)).train(), {"x": torch.randn(64, LENGTH, WIDTH)}


def test_each_view_has_projections_of_its_own_and_the_gradients_are_the_papers() -> None:
    model, batch = made()
    reference, exact = copy.deepcopy(model), copy.deepcopy(model)
    compressed(model, batch["x"])
    projections = compressed_weights(model)
    assert {f"blocks.{n}.{part}.weight" for n in range(2) for part in ("whole", "turned", "part")} <= set(projections)
    widths = {name: v.numel() for name, v in regions_of(model)[0].projections.items()}
    assert widths == {"whole.input": WIDTH, "turned.input": LENGTH, "part.input": 32}
    step(model, batch, lambda loss: loss)
    with rebuilt_inputs(reference, projections):
        step(reference, batch, lambda loss: loss)
    assert_same_gradients(model, reference)
    step(exact, batch, lambda loss: loss)
    assert_same_gradients(model, exact, {name for name, _ in model.named_parameters()} - set(projections))


@pytest.mark.parametrize("make", [made, lambda: (Stack(Again(), Again()).train(), made()[1])])
def test_the_peak_with_views_is_that_of_the_real_allocator(make: Any) -> None:
    model, batch = make()
    predicted = predict(model, batch)
    assert predicted.compressed_bytes < predicted.untouched_bytes
    assert measured_peak(model, batch) == pytest.approx(predicted.untouched_bytes, rel=1e-3)
    assert measured_peak(predicted.compressed, batch) == pytest.approx(predicted.compressed_bytes, rel=1e-3)


def test_a_decision_counts_the_projections_of_every_view() -> None:
    model, batch = made()
    (decision, _) = [d for d in tightest(model, batch).decisions if len(d.consumers) == 2]
    numel = 64 * LENGTH * WIDTH
    assert decision.bytes_before == 4 * numel and decision.sub_token_size is not None
    assert decision.bytes_after == 4 * (numel + numel // 2) // decision.sub_token_size


def test_views_whose_widths_have_no_sub_token_size_in_common_are_skipped_with_the_reason() -> None:
    model, batch = made(part=33)
    plan = tightest(model, batch)
    reasons = {skipped.module: skipped.reason for skipped in plan.skipped}
    assert reasons["blocks.0.part"] == (
        "no sub-token size from 2 to 128 divides its input width 64, and 33 of other views of its storage"
    )
    assert "blocks.0.whole" in reasons


def test_factored_gradients_of_views_are_those_of_their_own_projections() -> None:
    model, batch = made()
    dense = copy.deepcopy(model)
    compressed(model, batch["x"], gradients="factored")
    compressed(dense, batch["x"])
    step(model, batch, lambda loss: loss)
    step(dense, batch, lambda loss: loss)
    own, projections = dict(model.named_parameters()), compressed_weights(dense)
    for name in ("whole", "turned", "part"):
        weight = f"blocks.0.{name}.weight"
        v, gradient = compressed_weights(model)[weight], own[f"{weight}_carrier"].grad
        assert gradient is not None and v.shape[1] >= 2
        rebuilt = (gradient.unsqueeze(-1) * v).flatten(1)
        assert torch.equal(v, projections[weight])
        torch.testing.assert_close(rebuilt, dict(dense.named_parameters())[weight].grad)


@pytest.mark.slow
def test_compiled_views_have_projections_of_their_own() -> None:
    model, batch = made()
    exact = copy.deepcopy(model)
    compressed(model, batch["x"], compiled=True)
    approximate = set(compressed_weights(model))
    assert "blocks.0.turned.weight" in approximate
    torch._dynamo.reset()
    loss = step(torch.compile(model, fullgraph=True, backend="aot_eager"), batch, lambda loss: loss)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, step(exact, batch, lambda loss: loss))
    assert_same_gradients(model, exact, {name for name, _ in model.named_parameters()} - approximate)
