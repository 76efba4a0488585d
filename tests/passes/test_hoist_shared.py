"""What blocks make of tensors that all of them are given is taken out of their graphs, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

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
    """The operations taken out and those left, after checking that both together compute what the graph does."""
    gm = prepared(module, *given)
    state = list(state_of(module).values())
    mask = len(state) + 1
    hoisted = hoist_shared(gm, {mask})
    assert hoisted is not None and hoisted.inputs == (mask,)
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


def unhoisted(use: Callable[[Tensor, Tensor], Tensor], mask: Tensor, given: set[int] | None = None) -> bool:
    module = Block(use)
    return hoist_shared(prepared(module, *inputs(mask)), {3} if given is None else given) is None


def test_what_others_fuse_stays() -> None:
    assert unhoisted(lambda x, mask: x * mask.exp(), torch.randn(LENGTH, WIDTH))


def test_random_numbers_stay_for_each_block_draws_its_own() -> None:
    assert unhoisted(lambda x, mask: F.dropout(mask, 0.5) @ x, torch.randn(LENGTH, LENGTH))


def test_what_also_depends_on_the_block_stays() -> None:
    assert unhoisted(lambda x, mask: (x @ x.mT * mask) @ x, torch.randn(LENGTH, LENGTH))


def test_tensors_that_are_not_shared_stay() -> None:
    assert unhoisted(attend, boolean_mask(), given=set())


def test_the_graph_itself_stays_as_it_is() -> None:
    gm = prepared(Block(attend), *inputs(boolean_mask()))
    before = str(gm.graph)
    assert hoist_shared(gm, {3}) is not None
    assert str(gm.graph) == before
