"""What blocks make of tensors that all of them are given is taken out of their graphs, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.graph_text import operations, prepared
from velora_fx.capture import state_of
from velora_fx.passes.hoist_shared import hoist_shared

HEADS, LENGTH, WIDTH = 2, 6, 8


class Block(nn.Module):
    """A linear on x, and then `use(x, mask)`; x has one head more than there is."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.use = use

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.use(self.linear(x), mask)


def inputs(mask: Tensor) -> tuple[Tensor, Tensor]:
    return torch.randn(3, HEADS, LENGTH, WIDTH), mask


def boolean_mask() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(3, 1, -1, -1).clone()


def attend(x: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


def hoisted_and_run(module: nn.Module, given: tuple[Tensor, Tensor]) -> tuple[set[str], set[str]]:
    """The operations taken out and those left; both together compute what the graph does, which stays as it is."""
    gm = prepared(module, *given)
    before = str(gm.graph)
    state = list(state_of(module).values())
    mask = len(state) + 1
    hoisted = hoist_shared(gm, {mask})
    assert hoisted is not None and hoisted.inputs == (mask,)
    assert str(gm.graph) == before
    made = hoisted.shared(given[1])
    torch.testing.assert_close(hoisted.rest(*state, *given, *made), gm(*state, *given), rtol=0, atol=1e-6)
    return set(operations(hoisted.shared)), set(operations(hoisted.rest))


def test_the_mask_that_attention_makes_of_booleans_is_made_before() -> None:
    taken, left = hoisted_and_run(Block(attend), inputs(boolean_mask()))
    assert taken == {"zeros_like", "logical_not", "masked_fill"}
    assert left == {"linear", "scaled_dot_product_attention"}


def test_what_is_computed_of_the_mask_is_taken_out_and_views_of_it_stay() -> None:
    def use(x: Tensor, mask: Tensor) -> Tensor:
        return attend(x, ((1 - mask) * -1e9).unsqueeze(1))

    taken, left = hoisted_and_run(Block(use), inputs(torch.ones(3, LENGTH, LENGTH).tril()))
    assert taken == {"rsub", "mul"}
    assert left == {"linear", "unsqueeze", "scaled_dot_product_attention"}


def test_operands_of_matrix_products_are_taken_out_too() -> None:
    taken, left = hoisted_and_run(Block(lambda x, mask: mask.exp() @ x), inputs(torch.randn(LENGTH, LENGTH)))
    assert (taken, left) == ({"exp"}, {"linear", "matmul"})


STAYING: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor, set[int]]] = {
    "what others fuse": (lambda x, mask: x * mask.exp(), torch.randn(LENGTH, WIDTH), {3}),
    "random numbers, of which each block draws its own": (
        lambda x, mask: F.dropout(mask, 0.5) @ x, torch.randn(LENGTH, LENGTH), {3},
    ),
    "what also depends on the block": (lambda x, mask: (x @ x.mT * mask) @ x, torch.randn(LENGTH, LENGTH), {3}),
    "what is not shared": (attend, boolean_mask(), set()),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYING)
def test_there_is_nothing_to_take_out_of(name: str) -> None:
    use, mask, shared = STAYING[name]
    assert hoist_shared(prepared(Block(use), *inputs(mask)), shared) is None
