"""Lists of blocks within lists, and modules whose parts are called in their place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import velora_fx
from tests.helpers.gradients import assert_same_gradients, compressed_weights, rebuilt_inputs, step, tightest

WIDTH = 32


class FeedForward(nn.Module):
    def __init__(self, hidden: int = 2 * WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.net = nn.Sequential(nn.Linear(WIDTH, hidden), nn.GELU(), nn.Linear(hidden, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.norm(x))  # type: ignore[no-any-return]


class Mixer(FeedForward):
    """Another class of part."""


class Never(nn.Module):
    """Its forward is never called, and its own weight taken by the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.feed = Mixer(), FeedForward()
        self.scale = nn.Parameter(torch.eye(WIDTH))


def parts(kind: str) -> nn.Module:
    if kind == "Never":
        return Never()
    made = {"mix": Mixer(), "feed": FeedForward()}
    if kind == "ModuleDict":
        return nn.ModuleDict(made)
    if kind == "lists in a list":
        return nn.ModuleList([nn.ModuleList([made["mix"]]), nn.ModuleList([made["feed"]])])
    return nn.ModuleList(made.values()) if kind == "ModuleList" else nn.Sequential(*made.values())


def parts_of(layer: nn.Module) -> list[nn.Module]:
    return [module for module in layer.modules() if isinstance(module, FeedForward)]


class Nested(nn.Module):
    def __init__(self, kind: str, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(parts(kind) for _ in range(depth))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x @ layer.scale if isinstance(layer, Never) else x
            for part in parts_of(layer):
                x = x + part(x)
        return self.head(x).square().mean()  # type: ignore[no-any-return]


KINDS = ["ModuleList", "ModuleDict", "lists in a list", "Sequential", "Never"]
X = torch.randn(4, 64, WIDTH, generator=torch.Generator().manual_seed(1))


def scalar(output: Tensor) -> Tensor:
    return output


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_that_are_called_are_compressed(kind: str) -> None:
    reference, model = Nested(kind).train(), Nested(kind).train()
    plan = tightest(model, (X,))
    velora_fx.apply(model, plan, (X,))
    weights = compressed_weights(model)
    assert {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear)} == set(weights)
    with rebuilt_inputs(reference, weights):
        expected = step(reference, {"x": X}, scalar)
    assert torch.equal(step(model, {"x": X}, scalar), expected)
    assert_same_gradients(model, reference)


def test_a_weight_of_a_module_that_is_not_called_is_listed() -> None:
    reasons = {skipped.module: skipped.reason for skipped in tightest(Nested("Never").train(), (X,)).skipped}
    assert reasons == {f"layers.{number}": "its forward is not called, while its parts are" for number in range(3)}


@pytest.mark.parametrize("kind", ["ModuleList", "Never"])
def test_equal_parts_are_treated_alike(kind: str) -> None:
    tight, loose = tightest(Nested(kind), (X,)), velora_fx.plan(Nested(kind), None, (X,), optimizer="none")
    budget = (tight.planned.peak_bytes + loose.planned.peak_bytes) / 2 / 2**30
    plan = velora_fx.plan(Nested(kind), budget, (X,), optimizer="none", method="compress")
    assert 0 < len(plan.compressed) < len(tight.compressed)
    regions = {decision.region for decision in plan.decisions}
    assert len(regions) == 7  # three of each part, and the head


@pytest.mark.parametrize("kind", ["ModuleList", "Sequential", "Never"])
def test_parts_are_recomputed_as_blocks_are(kind: str) -> None:
    with pytest.raises(velora_fx.BudgetError) as raised:
        velora_fx.plan(Nested(kind), 1e-9, (X,), optimizer="none", method="exact")
    assert {item.region.split(".")[1] for item in raised.value.plan.recomputed} == {"0", "1", "2"}
    reference, model = Nested(kind).train(), Nested(kind).train()
    velora_fx.apply(model, raised.value.plan, (X,))
    assert torch.equal(step(model, {"x": X}, scalar), step(reference, {"x": X}, scalar))
    assert_same_gradients(model, reference)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ModuleList", "Never"])
def test_compiled_plans_compress_the_parts_too(kind: str) -> None:
    plan = tightest(Nested(kind), (X,), compiled=True)
    names = {name for decision in plan.compressed for name in decision.consumers}
    linears = {name for name, module in Nested(kind).named_modules() if isinstance(module, nn.Linear)}
    kept = {skipped.module for skipped in plan.skipped}
    assert names and names | kept >= linears


class Elsewhere(nn.Module):
    """Calls other modules than its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FeedForward() for _ in range(2))
        self.held = [FeedForward() for _ in range(2)]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.held:
            x = layer(x)
        return x.square().mean()


def test_a_model_that_calls_none_of_its_blocks_is_an_error_that_says_why() -> None:
    with pytest.raises(
        ValueError, match=r"the forward of Elsewhere calls none of its modules .*\(layers\.0, layers\.1\)"
    ):
        velora_fx.plan(Elsewhere(), 1, (X,))
