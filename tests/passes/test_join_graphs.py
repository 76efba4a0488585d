"""Graphs that run one after the other, joined, give what they give apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.helpers.graph_text import golden, graph_text, prepared
from velora_fx.capture import state_of
from velora_fx.passes.join_graphs import Piece, join_graphs

WIDTH = 8


class Shifted(nn.Module):
    """Holds a constant that the graph reads as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.tensor([1.0, 2.0]).repeat(WIDTH // 2)


def piece(module: nn.Module, name: str, takes: str, gives: str) -> Piece:
    """The module's graph as a piece whose parameters are called as if it was `name` in a larger model."""
    gm = prepared(module, torch.randn(3, WIDTH))
    state = [f"{name}.{key}" for key in state_of(module)]
    names = [f"layer_{key}".replace(".", "_") for key in state]
    return Piece(gm, (*names, takes), (gives,), dict(enumerate(state)))


def chain() -> tuple[nn.Module, list[Piece]]:
    module = nn.Sequential(Shifted(), Shifted())
    return module, [piece(module[0], "0", "x", "h"), piece(module[1], "1", "h", "y")]


def test_the_joined_graph_takes_what_no_piece_gives_state_first() -> None:
    _module, pieces = chain()
    joined = join_graphs(pieces, {"y"})
    assert joined.inputs == ("layer_0_linear_weight", "layer_1_linear_weight", "x")
    assert joined.outputs == ("y",)
    assert joined.state == {0: "0.linear.weight", 1: "1.linear.weight"}
    assert sorted(joined.gm.meta["state"].values()) == ["0.linear.weight", "1.linear.weight"]


def test_it_gives_what_is_needed_of_any_piece() -> None:
    _, pieces = chain()
    assert join_graphs(pieces, {"h", "y", "z"}).outputs == ("h", "y")


def test_it_computes_what_the_pieces_compute() -> None:
    module, pieces = chain()
    x = torch.randn(5, WIDTH)
    joined = join_graphs(pieces, {"h", "y"})
    h, y = joined.gm(*state_of(module).values(), x)
    torch.testing.assert_close(h, module[0](x))
    torch.testing.assert_close(y, module(x))


def test_a_weight_that_two_pieces_take_is_one_input() -> None:
    module = Shifted()
    first, second = piece(module, "0", "x", "h"), piece(module, "0", "h", "y")
    joined = join_graphs([first, second], {"y"})
    assert joined.inputs == ("layer_0_linear_weight", "x")
    x = torch.randn(5, WIDTH)
    expected = module(module(x))
    torch.testing.assert_close(joined.gm(module.linear.weight, x)[0], expected)


def test_one_piece_alone_stays_as_it_is() -> None:
    module = nn.Sequential(nn.Linear(WIDTH, 4), nn.ReLU())
    only = piece(module, "0", "x", "y")
    joined = join_graphs([only], {"y"})
    assert graph_text(joined.gm) == golden(
        """
        %0: f32[s0, 4] = linear(%x, %0.0.weight, %0.0.bias)
        %1: f32[s0, 4] = relu(%0)
        return (%1)
        """
    )
    assert graph_text(only.gm) == graph_text(prepared(module, torch.randn(3, WIDTH)))
