"""What the analysis of a step leaves out, and that its figures are those of the training that follows."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import velora_fx
from tests.helpers.gradients import tightest
from tests.helpers.toys import Block, rows, stack

WIDTH, VOCABULARY = 32, 256


class Language(nn.Module):
    """Token and position tables, blocks that repeat or one that does not, and a head over the vocabulary."""

    def __init__(self, positions: int, num_blocks: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(positions, WIDTH)
        self.body = nn.ModuleList(Block(WIDTH) for _ in range(num_blocks)) if num_blocks > 1 else Block(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.body if isinstance(self.body, nn.ModuleList) else [self.body]:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def consumers(plan: velora_fx.Plan) -> set[str]:
    return {name for decision in plan.compressed for name in decision.consumers}


def reasons(plan: velora_fx.Plan) -> dict[str, str]:
    return {skipped.module: skipped.reason for skipped in plan.skipped}


def test_a_narrow_input_is_left_out_unless_it_is_asked_for() -> None:
    layers = [nn.Linear(64, 8), nn.GELU(), nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 4)]
    model, batch = nn.Sequential(*layers), (torch.randn(32, 64),)
    plan = tightest(model, batch)
    assert consumers(plan) == {"4"}  # the input of the first is the batch
    assert reasons(plan)["2"].startswith("its input is only 8 wide")
    assert consumers(tightest(model, batch, filter_fn=lambda module, name: True)) == {"2", "4"}


@pytest.mark.parametrize("num_blocks", [2, 1])
@pytest.mark.parametrize("positions", [16, 1024])
def test_the_head_over_the_vocabulary_is_left_out_whatever_else_is_embedded(positions: int, num_blocks: int) -> None:
    batch = {"ids": torch.arange(64).reshape(4, 16)}
    plan = tightest(Language(positions, num_blocks).train(), batch)
    assert "vocabulary" in reasons(plan)["head"]
    assert "head" not in consumers(plan) and consumers(plan)
    chosen = tightest(Language(positions, num_blocks).train(), batch, filter_fn=lambda module, name: True)
    assert "vocabulary" not in reasons(chosen).get("head", "")


def test_a_weight_that_is_computed_from_others_is_listed_as_skipped() -> None:
    model = stack()
    for linear in (model.head, *(block.up for block in model.blocks)):
        parametrizations.weight_norm(linear)
    plan = tightest(model, (rows(),))
    for place in ("head", "blocks.0.up", "blocks.2.up"):
        assert any(name.startswith(place) for name in reasons(plan)), place
        assert not any(name.startswith(place) for name in consumers(plan)), place
    assert "blocks.0.down" in consumers(plan)


def approximate(model: nn.Module, reference: nn.Module) -> set[str]:
    """The parameters whose gradients differ from the reference's."""
    for one in (model, reference):
        torch.manual_seed(5)
        one(rows()).backward()
    expected = dict(reference.named_parameters())
    return {name for name, p in model.named_parameters() if not torch.allclose(p.grad, expected[name].grad, rtol=1e-4)}


def observe(module: nn.Module, how: str) -> Any:
    if how == "forward":
        return module.register_forward_hook(lambda *_: None)
    if how == "forward_pre":
        return module.register_forward_pre_hook(lambda *_: None)
    return module.register_full_backward_hook(lambda *_: None)


@pytest.mark.parametrize("how", ["forward", "forward_pre", "backward"])
@pytest.mark.parametrize("hooked", [pytest.param((0,), marks=pytest.mark.slow), (0, 1, 2)])
def test_where_inner_modules_have_hooks_the_plan_claims_only_what_training_does(
    hooked: tuple[int, ...], how: str
) -> None:
    model = stack()
    for number in hooked:
        observe(model.blocks[number].up, how)
    plan = tightest(model, (rows(),))
    velora_fx.apply(model, plan, (rows(),))
    assert approximate(model, stack()) == {f"{name}.weight" for name in consumers(plan)}
    assert {name.split(".")[1] for name in consumers(plan) if name.startswith("blocks")} == {"0", "1", "2"}
    assert any("blocks.0 could not be captured" in note and "hooks" in note for note in plan.notes)


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
    plan = tightest(Rounding().train(), (torch.randn(8, 32, 64),))
    assert {"blocks.0.1.inner", "blocks.1.1.inner"} <= {item.module for item in plan.skipped}


def test_what_a_model_raises_in_planning_is_raised_alone_without_a_log() -> None:
    logged: list[str] = []
    handler = logging.Handler(logging.DEBUG)
    handler.emit = lambda record: logged.append(record.getMessage())
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(handler)
    try:
        with pytest.raises(RuntimeError, match="same reduction dim"):
            velora_fx.plan(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)), 1, torch.randn(4, 32))
    finally:
        logger.removeHandler(handler)
    assert logged == []
