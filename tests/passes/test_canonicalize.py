"""Every product with a parameter becomes a `linear` with the same numbers; every other product stays what it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from tests.helpers.graph_text import call, gradients, graph_text, operations, prepared, same
from tests.helpers.toys import Of
from velora_fx.capture.export import capture
from velora_fx.passes import run
from velora_fx.passes.canonicalize import canonicalize

IN, OUT = 6, 10


def product(function: Callable[[Of, Tensor], Tensor]) -> Of:
    """A forward made of a function of the module and its input; `w` is [IN, OUT], `weight` is [OUT, IN]."""
    torch.manual_seed(0)
    shapes = {"w": (IN, OUT), "weight": (OUT, IN), "bias": (OUT,), "stack": (3, IN, OUT)}
    return Of(function, **{name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()})


def gpt2(m: Of, x: Tensor) -> Tensor:
    """transformers.pytorch_utils.Conv1D"""
    return torch.addmm(m.bias, x.view(-1, IN), m.w).view(*x.shape[:-1], OUT)


def attention(m: Of, x: Tensor) -> Tensor:
    q, k = F.linear(x, m.weight), F.linear(x, m.weight)
    return q @ k.transpose(-1, -2)


REWRITTEN = {
    "addmm": gpt2,
    "mm": lambda m, x: torch.mm(x.flatten(0, -2), m.w),
    "matmul": lambda m, x: x @ m.w,
    "matmul with bias": lambda m, x: x @ m.w + m.bias,
    "matmul with t()": lambda m, x: x @ m.weight.t(),
    "matmul with T": lambda m, x: x @ m.weight.T,
    "matmul with mT": lambda m, x: x @ m.weight.mT,
    "matmul with transpose": lambda m, x: x @ m.weight.transpose(-1, -2),
    "matmul with swapaxes": lambda m, x: x @ m.weight.swapaxes(0, 1),
    "matmul with permute": lambda m, x: x @ m.weight.permute(1, 0),
    "mm of t()": lambda m, x: torch.mm(x.flatten(0, -2), m.weight.t()),
    "addmm of t()": lambda m, x: torch.addmm(m.bias, x.flatten(0, -2), m.weight.t()),
    "matmul with a cast weight": lambda m, x: x.double() @ m.w.double(),
    "matmul with one of a stack": lambda m, x: x @ m.stack[1],
    "matmul with a slice": lambda m, x: x @ m.w[:, :4],
}
KEPT = {
    "linear": lambda m, x: F.linear(x, m.weight, m.bias),
    "query times key": attention,
    "a stack of matrices": lambda m, x: torch.bmm(x, m.stack),
    "a matmul with a stack": lambda m, x: x @ m.stack,
    "addmm with alpha": lambda m, x: torch.addmm(m.bias, x.flatten(0, -2), m.w, alpha=2),
    "addmm with beta": lambda m, x: torch.addmm(m.bias, x.flatten(0, -2), m.w, beta=0.5),
    "addmm with a matrix": lambda m, x: torch.addmm(x.new_ones(x[..., 0].numel(), OUT), x.flatten(0, -2), m.w),
    "addmm with one number": lambda m, x: torch.addmm(m.bias[:1], x.flatten(0, -2), m.w),
    "the parameter on the left": lambda m, x: m.weight @ x.transpose(-1, -2),
    "a computed weight": lambda m, x: x @ (m.w * 2),
}
SHAPES = ((5, IN), (2, 5, IN))
shapes = pytest.mark.parametrize("shape", SHAPES, ids=["2-D", "3-D"])


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).requires_grad_()


@cache
def rewritten(name: str, shape: tuple[int, ...]) -> tuple[Of, GraphModule]:
    """One of REWRITTEN, and its graph after the passes."""
    module = product(REWRITTEN[name])
    return module, prepared(module, rows(*shape))


def captured(module: nn.Module, x: Tensor) -> GraphModule:
    return capture(module, (x,), {}).gm


def test_addmm_becomes_linear_of_the_transposed_weight():
    gm = captured(product(gpt2), rows(2, 5, IN))
    assert_expected_inline(
        graph_text(gm),
        """\
%0 = sym_size(%x, 0)
%1 = sym_size(%x, 1)
%2: f32[s0, s1] = view(%x, [-1, 6])
%3: f32[s0, 10] = addmm(%bias, %2, %w)
%4: f32[s2, s3, 10] = view(%3, [%0, %1, 10])
return (%4)""",
    )
    assert_expected_inline(
        graph_text(run(gm, [canonicalize])),
        """\
%0 = sym_size(%x, 0)
%1 = sym_size(%x, 1)
%2: f32[s0, s1] = view(%x, [-1, 6])
%3 = t(%w)
%4: f32[s0, 10] = linear(%2, %3, %bias)
%5: f32[s2, s3, 10] = view(%4, [%0, %1, 10])
return (%5)""",
    )


def test_matmul_with_a_transposed_weight_becomes_linear_of_the_weight_itself():
    gm = captured(product(lambda m, x: x @ m.weight.t()), rows(2, 5, IN))
    assert_expected_inline(
        graph_text(gm),
        """\
%0: f32[6, 10] = t(%weight)
%1: f32[s0, s1, 10] = matmul(%x, %0)
return (%1)""",
    )
    assert_expected_inline(
        graph_text(run(gm, [canonicalize])),
        """\
%0: f32[s0, s1, 10] = linear(%x, %weight)
return (%0)""",
    )


@shapes
@pytest.mark.parametrize("name", REWRITTEN)
def test_a_product_with_a_parameter_becomes_a_linear_whose_output_and_gradients_are_bit_equal_to_eager(name, shape):
    module, gm = rewritten(name, shape)
    found, x = operations(gm), rows(*shape)
    assert found["linear"] == 1 and not {"addmm", "mm", "matmul"} & set(found)
    ours, eager = call(gm, module, x), module(x)
    assert torch.equal(ours, eager)
    assert same(gradients(ours, module, x), gradients(eager, module, x))


@pytest.mark.parametrize("name", ["addmm", "matmul", "matmul with t()"])
def test_a_rewritten_product_is_bit_equal_to_eager_under_autocast(name):
    module, gm = rewritten(name, SHAPES[1])
    x = rows(*SHAPES[1])
    with torch.autocast("cpu", torch.bfloat16):
        ours, eager = call(gm, module, x), module(x)
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, eager)
    assert same(gradients(ours, module, x), gradients(eager, module, x))


@pytest.mark.parametrize("name", KEPT)
def test_any_other_product_stays_as_it_is(name):
    gm = captured(product(KEPT[name]), rows(3, 5, IN))
    before = graph_text(gm)
    assert graph_text(run(gm, [canonicalize])) == before


@pytest.mark.parametrize("name", REWRITTEN)
def test_a_second_run_changes_nothing(name):
    _, gm = rewritten(name, SHAPES[1])
    once = graph_text(gm)
    assert graph_text(run(gm, [canonicalize])) == once


def used_twice(m: Of, x: Tensor) -> Tensor:
    transposed = m.weight.t()
    return x @ transposed + transposed.sum(0)


def test_a_transpose_with_another_user_stays():
    module, x = product(used_twice), rows(5, IN)
    gm = prepared(module, x)
    assert operations(gm) == {"t": 1, "linear": 1, "sum": 1, "add": 1}
    assert torch.equal(call(gm, module, x), module(x))


def detached_transpose(m: Of, x: Tensor) -> Tensor:
    with torch.no_grad():
        transposed = m.weight.t()
    return x @ transposed + m.bias


def test_a_weight_transposed_under_no_grad_gets_no_gradient():
    module, x = product(detached_transpose), rows(5, IN)
    ours = gradients(call(prepared(module, x), module, x), module, x)
    assert same(ours, gradients(module(x), module, x))


def test_metadata_assertions_are_dropped():
    gm = captured(product(lambda m, x: F.linear(x, m.weight).to(torch.float64)), rows(5, IN))
    assert operations(gm)["_assert_tensor_metadata"] == 1
    assert operations(run(gm, [canonicalize])) == {"linear": 1, "to": 1}
