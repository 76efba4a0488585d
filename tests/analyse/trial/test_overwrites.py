"""Blocks that write in place are recomputed only where that is exact."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import velora_fx
from tests.helpers.gradients import assert_same_gradients, compressed_weights, step
from velora_fx.runtime import Notices, install_checkpointing

WIDTH = 32


def identity(h: Tensor) -> Tensor:
    return h


def halved(h: Tensor) -> Tensor:
    h *= 0.5
    return h


def halved_in_part(h: Tensor) -> Tensor:
    h[..., ::2].mul_(0.5)
    return h


class Writing(nn.Module):
    """A block that writes to the result of its first product, its own input, or its output."""

    def __init__(self, bias: bool, inside: Callable[[Tensor], Tensor], given: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH, bias=bias), nn.Linear(2 * WIDTH, WIDTH, bias=bias)
        self.inside, self.given = inside, given

    def forward(self, x: Tensor) -> Tensor:
        x = self.given(x)
        return self.down(F.gelu(self.inside(self.up(self.norm(x)))))  # type: ignore[no-any-return]


class Stack(nn.Module):
    def __init__(
        self,
        bias: bool = True,
        inside: Callable[[Tensor], Tensor] = identity,
        given: Callable[[Tensor], Tensor] = identity,
        after: Callable[[Tensor], Tensor] = identity,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Writing(bias, inside, given) for _ in range(3))
        self.head, self.after = nn.Linear(WIDTH, 4), after

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for block in self.blocks:
            x = self.after(block(x))
        return self.head(x).square().mean()  # type: ignore[no-any-return]


def made(**writes: Any) -> tuple[Stack, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Stack(**writes).train(), {"x": torch.randn(8, 16, WIDTH)}


def halfway(model: nn.Module, batch: dict[str, Tensor], share: float = 0.5, **options: Any) -> velora_fx.Plan:
    """The plan half of the way from the smallest reachable to the untouched peak, or another share of it."""
    options = {"optimizer": "none", "method": "compress", **options}
    with pytest.raises(velora_fx.BudgetError) as raised:
        velora_fx.plan(model, 1e-9, batch, **options)
    ends = raised.value.smallest_peak_bytes, raised.value.plan.baseline.peak_bytes
    assert ends[0] < ends[1]
    budget = ends[0] + share * (ends[1] - ends[0])
    return velora_fx.plan(model, budget / 2**30, batch, **options)


def assert_trains_like_the_untouched(model: Stack, batch: dict[str, Tensor], plan: velora_fx.Plan) -> None:
    untouched = copy.deepcopy(model)
    velora_fx.apply(model, plan, batch)
    approximate = set(compressed_weights(model))
    assert torch.equal(step(model, batch, lambda loss: loss), step(untouched, batch, lambda loss: loss))
    assert_same_gradients(model, untouched, {name for name, _ in model.named_parameters()} - approximate)


INSIDE = (halved, halved_in_part, nn.SiLU(inplace=True), nn.ReLU(inplace=True))


@pytest.mark.parametrize("options", [{"method": method} for method in ("compress", "exact", "auto")])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inside", INSIDE)
def test_a_block_that_writes_to_a_products_result_trains_like_the_untouched(
    inside: Callable[[Tensor], Tensor], bias: bool, options: dict[str, str]
) -> None:
    model, batch = made(bias=bias, inside=inside)
    plan = halfway(model, batch, **options)
    assert all(item.recompute == "all" for item in plan.recomputed)
    assert bool(plan.recomputed) or options["method"] != "exact"
    assert_trains_like_the_untouched(model, batch, plan)


def test_what_cannot_be_recomputed_in_part_is_said_once_for_all_blocks() -> None:
    model, batch = made(inside=halved)
    report = str(halfway(model, batch, method="exact"))
    assert report.count("is recomputed whole or not: a matrix product's result is written in place") == 1
    assert "blocks.0-2 is recomputed whole or not" in report
    assert "written in place" not in str(halfway(*made(), method="exact"))


def test_blocks_that_write_nothing_are_recomputed_in_part() -> None:
    model, batch = made()
    assert "pointwise" in {item.recompute for item in halfway(model, batch, 0.9, method="exact").recomputed}


@pytest.mark.parametrize("bias", [True, False])
def test_a_products_result_that_is_written_after_its_block_is_not_kept_for_it(bias: bool) -> None:
    model, batch = made(bias=bias, after=halved)
    plan = halfway(model, batch, method="exact")
    assert {item.recompute for item in plan.recomputed} == {"all"}
    assert_trains_like_the_untouched(model, batch, plan)


def test_a_block_that_writes_to_its_input_is_not_recomputed() -> None:
    model, batch = made(given=halved)
    again = copy.deepcopy(model)
    install_checkpointing(again, {f"blocks.{number}": "all" for number in range(3)}, Notices(None))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # what it would do
        step(again, batch, lambda loss: loss)
    plan = velora_fx.plan(model, None, batch, optimizer="none", method="exact")
    assert not plan.recomputed and "what it is given is written in place" in str(plan)


def test_compiled_blocks_that_write_to_a_products_result_are_recomputed_whole() -> None:
    model, batch = made(inside=halved)
    plan = halfway(model, batch, method="exact", compiled="blocks")
    assert {item.recompute for item in plan.recomputed} == {"all"}


def test_a_plan_for_a_block_that_writes_nothing_is_refused_for_one_that_does() -> None:
    model, batch = made()
    plan = halfway(model, batch, 0.9, method="exact")
    writing, _ = made(inside=halved)
    with pytest.raises(ValueError, match=r"recomputes blocks\.\d pointwise.*written in place"):
        velora_fx.apply(writing, plan, batch)
    assert torch.equal(writing(**batch), made(inside=halved)[0](**batch))


def test_a_trained_input_of_a_block_may_be_stepped_by_the_optimizer() -> None:
    class Latents(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.latents = nn.Parameter(torch.randn(8, 16, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block(self.latents) * x.mean()
            return self.head(x).square().mean()  # type: ignore[no-any-return]

    model, batch = Latents().train(), made()[1]
    plan = halfway(model, batch, method="exact")
    assert plan.recomputed
