"""Outputs of compressed linears may be written in place, as those of linears may."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.gradients import assert_same_gradients, compressed_weights
from tests.helpers.toys import compressed
from velora_fx.ops.velora import compress, linear

WIDTH = 16


def scaled(y: Tensor) -> Tensor:
    y /= 3.0
    return y


def partly(y: Tensor) -> Tensor:
    y[..., : WIDTH // 2] = y[..., WIDTH // 2 :] * 3.0
    y[..., 0].mul_(2.0)
    return y


WRITES: tuple[Callable[[Tensor], Tensor], ...] = (scaled, partly, F.relu_)


class Head(nn.Module):
    """A norm and a projector, each a region of its own beside the block, whose output the model writes in place."""

    def __init__(self, bias: bool, write: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))])
        self.projector = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        y = self.write(self.projector(x.sin()))
        return y.square().mean()


def assert_equal_to_the_untouched(bias: bool, write: Callable[[Tensor], Tensor], x: Tensor, target: str) -> None:
    torch.manual_seed(0)
    model = Head(bias, write).train()
    untouched = copy.deepcopy(model)
    compressed(model, x, compiled=target == "inductor")
    approximate = set(compressed_weights(model))
    assert "projector.weight" in approximate
    torch._dynamo.reset()
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if target == "inductor" else model
    loss, expected = run(x), untouched(x)
    torch.testing.assert_close(loss, expected)
    assert target != "eager" or torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    assert_same_gradients(model, untouched, {name for name, _ in model.named_parameters()} - approximate)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(6,), (2, 6), (2, 3, 6)])
def test_a_projectors_output_may_be_written_in_place(
    lead: tuple[int, ...], bias: bool, write: Callable[[Tensor], Tensor]
) -> None:
    assert_equal_to_the_untouched(bias, write, torch.randn(*lead, WIDTH), "eager")


@pytest.mark.parametrize("write", [scaled, *(pytest.param(w, marks=pytest.mark.slow) for w in (partly, F.relu_))])
def test_a_compiled_projectors_output_may_be_written_in_place(write: Callable[[Tensor], Tensor]) -> None:
    assert_equal_to_the_untouched(True, write, torch.randn(2, 6, WIDTH), "inductor")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (6,), (2, 6), (2, 3, 6)])
def test_no_operator_returns_a_view(lead: tuple[int, ...], bias: bool) -> None:
    x, weight, v = torch.randn(*lead, WIDTH), torch.randn(4, WIDTH, requires_grad=True), torch.randn(4, 4)
    z = compress(x, v)
    y = linear(x, weight, torch.randn(4) if bias else None, z, v, None)
    assert not (z._is_view() or y._is_view())
