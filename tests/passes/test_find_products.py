"""Every product with a parameter is found under the name of its module, with the reason where it is not a linear."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.graph_text import graph_text, prepared
from tests.helpers.toys import Of
from velora_fx.passes import run
from velora_fx.passes.find_products import Product, find_products
from velora_fx.passes.swap import Choice, swap

WIDTH = 8


@torch.library.custom_op("velora_tests::mixed", mutates_args=())
def mixed(x: Tensor, stack: Tensor, bias: Tensor) -> Tensor:
    return x @ stack + bias


@mixed.register_fake
def _(x: Tensor, stack: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(x)


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape or (WIDTH, WIDTH)))


def products(module: nn.Module) -> tuple[Product, ...]:
    return find_products(prepared(module, torch.zeros(3, 5, WIDTH)))


def consumers(module: nn.Module) -> list[str]:
    return [product.consumer for product in products(module)]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, x: m.fc(x), 1),
        (lambda m, x: x @ m.fc.weight, 0),
        (lambda m, x: torch.addmm(m.fc.bias, x[0], m.fc.weight), 0),
        (lambda m, x: x @ m.fc.weight.t(), 1),
        (lambda m, x: F.linear(x, m.fc.weight[:4]), None),
        (lambda m, x: m.fc(x) + m.fc.weight.sum(), None),
        (lambda m, x: m.fc(m.fc(x)), None),
        (lambda m, x: x @ m.fc.weight + m.fc.weight.t().sum(), None),
    ],
)
def test_the_dimension_of_the_input_is_told_where_all_of_the_weight_is_used_once(function, expected):
    assert {product.input_dim for product in products(Of(function, fc=linear()))} == {expected}


def test_a_linear_is_named_by_its_module():
    block = nn.Sequential()
    block.add_module("mlp", nn.Sequential(linear(), nn.GELU(), linear()))
    assert consumers(block) == ["mlp.0", "mlp.2"]


def test_products_come_in_the_order_of_the_graph():
    assert consumers(Of(lambda m, x: m.a(m.b(x)), a=linear(), b=linear())) == ["b", "a"]


def test_a_region_that_is_the_linear_itself_has_no_name():
    assert consumers(linear()) == [""]


def test_a_weight_of_another_name_is_named_itself():
    gate = nn.Module()
    gate.matrix = matrix()
    assert consumers(Of(lambda m, x: x @ m.gate.matrix, gate=gate)) == ["gate.matrix"]


def test_the_second_use_of_a_linear_is_numbered():
    assert consumers(Of(lambda m, x: m.a(m.a(m.a(x))), a=linear())) == ["a", "a#2", "a#3"]


def test_a_tied_weight_is_one_parameter_used_twice():
    first, second = linear(), linear()
    second.weight = first.weight
    found = products(Of(lambda m, x: m.b(m.a(x)), a=first, b=second))
    assert [(product.consumer, product.parameter) for product in found] == [("a", "a.weight"), ("a#2", "a.weight")]


def test_the_parts_of_a_fused_weight_are_uses_of_one_parameter():
    def apart(m: Of, x: Tensor) -> Tensor:
        q, k, v = m.qkv.chunk(3)
        return F.linear(x, q) + F.linear(x, k) + F.linear(x, v)

    def sliced(m: Of, x: Tensor) -> Tensor:
        return F.linear(x, m.qkv[:WIDTH]) + F.linear(x, m.qkv[WIDTH:])

    assert consumers(Of(apart, qkv=matrix(3 * WIDTH, WIDTH))) == ["qkv", "qkv#2", "qkv#3"]
    assert consumers(Of(sliced, qkv=matrix(2 * WIDTH, WIDTH))) == ["qkv", "qkv#2"]


def test_the_weight_may_be_cast_on_the_way():
    def cast(m: Of, x: Tensor) -> Tensor:
        half = x.to(torch.bfloat16)
        return F.linear(half, m.w.to(torch.bfloat16)) + F.linear(half, m.w.type_as(half))

    assert consumers(Of(cast, w=matrix())) == ["w", "w#2"]


NONE: dict[str, Callable[..., Tensor]] = {
    "query times key": lambda m, x: x @ x.transpose(1, 2),
    "a computed weight": lambda m, x: F.linear(x, m.w * 2),
    "a detached weight": lambda m, x: F.linear(x, m.w.detach()),
    "a factor of each feature": lambda m, x: x * m.w[0],
    "a function with mm in its name": lambda m, x: x + torch.lgamma(m.w).sum(),
    "a normalisation": lambda m, x: F.layer_norm(x, (WIDTH,), m.w[0]),
    "a lookup": lambda m, x: F.embedding(x[..., 0].long(), m.w),
}


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_product_with_a_trained_parameter_is_not_listed(name):
    assert consumers(Of(NONE[name], w=matrix())) == []


OTHERS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "a stack of matrices": (lambda m, x: torch.bmm(x, m.stack), "bmm"),
    "matrices picked from a stack": (lambda m, x: torch.bmm(x, m.stack[torch.tensor([2, 0, 1])]), "bmm"),
    "a matmul with a stack": (lambda m, x: x @ m.stack, "matmul"),
    "a sum with a stack": (lambda m, x: torch.baddbmm(m.bias, x, m.stack), "baddbmm"),
    "einsum": (lambda m, x: torch.einsum("btd,bdo->bto", x, m.stack), "einsum"),
    "inner": (lambda m, x: torch.inner(x, m.stack), "inner"),
    "tensordot": (lambda m, x: torch.tensordot(x, m.stack, dims=([2], [1])), "tensordot"),
    "a mixture of experts": (
        lambda m, x: torch._grouped_mm(x.flatten(0, 1).bfloat16(), m.stack.bfloat16(), torch.arange(5, 16, 5).int()),
        "_grouped_mm",
    ),
    "bilinear": (lambda m, x: F.bilinear(x, x, m.stack.expand(3, WIDTH, WIDTH), m.bias[:3]), "bilinear"),
    "conv1d": (lambda m, x: F.conv1d(x.mT, m.stack[..., :2], m.bias[:3]), "conv1d"),
    "conv1d with padding by name": (
        lambda m, x: F.conv1d(x.mT, m.stack[..., :3], m.bias[:3], padding="same"),
        "conv1d",
    ),
    "conv_transpose1d": (
        lambda m, x: F.conv_transpose1d(x.mT, m.stack.transpose(0, 1), m.bias[:3]),
        "conv_transpose1d",
    ),
    "addmm with alpha": (lambda m, x: torch.addmm(m.bias, x[0], m.stack[0], alpha=2), "addmm"),
    "addmm with a matrix": (lambda m, x: torch.addmm(x[1], x[0], m.stack[0]), "addmm"),
    "the parameter on the left": (lambda m, x: m.stack[0] @ x.mT, "matmul"),
    "an operator of another library": (lambda m, x: mixed(x, m.stack, m.bias), "mixed"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_product_is_listed_once_with_its_operation_as_the_reason(name):
    """Its bias is multiplied with nothing and is not listed."""
    function, operation = OTHERS[name]
    (product,) = products(Of(function, stack=matrix(3, WIDTH, WIDTH), bias=matrix(WIDTH)))
    assert (product.consumer, product.parameter) == ("stack", "stack")
    assert product.reason is not None and f" {operation}," in product.reason


def test_a_product_of_two_parameters_lists_both():
    def low_rank(m: Of, x: Tensor) -> Tensor:
        return F.linear(x, torch.einsum("or,rd->od", m.up, m.down))

    assert consumers(Of(low_rank, up=matrix(WIDTH, 2), down=matrix(2, WIDTH))) == ["up", "down"]


def test_a_linear_has_no_reason_against_it():
    assert [product.reason for product in products(Of(lambda m, x: x @ m.w, w=matrix(WIDTH, 4)))] == [None]


def test_the_graph_is_left_as_it_was_and_compressed_linears_are_not_listed_again():
    gm = prepared(nn.Sequential(linear(), nn.ReLU(), linear()), torch.zeros(3, 5, WIDTH))
    before = graph_text(gm)
    assert [product.consumer for product in find_products(gm)] == ["0", "2"]
    assert graph_text(gm) == before
    run(gm, [lambda graph: swap(graph, {"0": Choice("0.input", 4)})])
    assert [product.consumer for product in find_products(gm)] == ["2"]
