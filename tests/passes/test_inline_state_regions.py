"""Grad-mode and autocast stretches of a forward stay what they are when the captured graph runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.fx import GraphModule

from tests.helpers.graph_text import call, gradients, graph_text, operations, prepared, same
from tests.helpers.toys import Of
from velora_fx.capture import Call, CaptureError, key_of, make_graph, state_of
from velora_fx.capture.export import capture
from velora_fx.passes import PREPARE, run


def pair(forward: Callable[[Of, Tensor], Tensor]) -> Of:
    """Two linears; the forward says in which state each runs."""
    torch.manual_seed(0)
    return Of(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 8))


def detached(m: Of, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = m.a(x).tanh()
    return m.b(h)


def enabled_inside(m: Of, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = m.a(x)
        with torch.enable_grad():
            g = m.b(h)
        h = h * 2
    return h + g


def full_precision(m: Of, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        h = m.a(x.float()).exp()
    return m.b(h)


def low_precision(m: Of, x: Tensor) -> Tensor:
    h = m.a(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = m.b(h)
    return y.float() + h


def nested(m: Of, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        h = m.a(x)
        with torch.autocast("cpu", enabled=False):
            y = m.b(h.float())
        z = m.a(y)
    return y + z.float()


def low_precision_detached(m: Of, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = m.a(x)
        with torch.autocast("cpu", torch.bfloat16):
            g = m.a(h)
    return m.b(h * g.float())


def two_results(m: Of, x: Tensor) -> Tensor:
    with torch.no_grad():
        mean, spread = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    return m.b(m.a((x - mean) / spread))


def in_submodules(m: Of, x: Tensor) -> Tensor:
    return m.second(m.b(m.first(m.a(x))))


STRETCHES = (
    detached, enabled_inside, full_precision, low_precision, nested, low_precision_detached, two_results, in_submodules,
)  # fmt: skip


@pytest.fixture(scope="module", params=STRETCHES, ids=lambda forward: forward.__name__)
def stretch(request: pytest.FixtureRequest) -> tuple[Of, GraphModule]:
    """A module with a stretch, and its graph captured with four rows."""
    module = pair(request.param)
    if request.param is in_submodules:
        module.first, module.second = pair(detached), pair(low_precision)
    return module, prepared(module, rows(4))


def rows(count: int = 4) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(count)).requires_grad_()


def test_a_no_grad_stretch_becomes_nodes_that_set_and_reset_the_grad_mode_and_enable_grad_inside_splits_it():
    assert_expected_inline(
        graph_text(prepared(pair(enabled_inside), rows())),
        """\
_set_grad_enabled(False)
%0: f32[s0, 8] = linear(%x, %a.weight, %a.bias)
_set_grad_enabled(True)
%1: f32[s0, 8] = linear(%0, %b.weight, %b.bias)
_set_grad_enabled(False)
%2: f32[s0, 8] = mul(%0, 2)
_set_grad_enabled(True)
%3: f32[s0, 8] = add(%2, %1)
return (%3)""",
    )


def test_a_stretch_without_autocast_is_kept_where_the_caller_has_none():
    assert_expected_inline(
        graph_text(prepared(pair(full_precision), rows())),
        """\
%0 = _enter_autocast('cpu', bfloat16, False, True)
%1: f32[s0, s1] = to(%x, float32)
%2: f32[s0, 8] = linear(%1, %a.weight, %a.bias)
%3: f32[s0, 8] = exp(%2)
_exit_autocast(%0)
%4: f32[s0, 8] = linear(%3, %b.weight, %b.bias)
return (%4)""",
    )


def test_autocast_stretches_become_nodes_that_enter_and_exit_them_and_stay_nested():
    assert_expected_inline(
        graph_text(prepared(pair(nested), rows())),
        """\
%0 = _enter_autocast('cpu', bfloat16, True, True)
%1: bf16[s0, 8] = linear(%x, %a.weight, %a.bias)
%2 = _enter_autocast('cpu', bfloat16, False, True)
%3: f32[s0, 8] = to(%1, float32)
%4: f32[s0, 8] = linear(%3, %b.weight, %b.bias)
_exit_autocast(%2)
%5: bf16[s0, 8] = linear(%4, %a.weight, %a.bias)
_exit_autocast(%0)
%6: f32[s0, 8] = to(%5, float32)
%7: f32[s0, 8] = add(%4, %6)
return (%7)""",
    )


def test_autocast_inside_no_grad_stays_inside():
    assert_expected_inline(
        graph_text(prepared(pair(low_precision_detached), rows())),
        """\
_set_grad_enabled(False)
%0: f32[s0, 8] = linear(%x, %a.weight, %a.bias)
%1 = _enter_autocast('cpu', bfloat16, True, True)
%2: bf16[s0, 8] = linear(%0, %a.weight, %a.bias)
_exit_autocast(%1)
_set_grad_enabled(True)
%3: f32[s0, 8] = to(%2, float32)
%4: f32[s0, 8] = mul(%0, %3)
%5: f32[s0, 8] = linear(%4, %b.weight, %b.bias)
return (%5)""",
    )


@pytest.mark.parametrize("ambient", [False, True], ids=["no autocast", "autocast"])
def test_output_and_gradients_are_bit_equal_to_eager_at_another_batch_size(stretch, ambient):
    module, gm = stretch
    x = rows(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=ambient):
        ours, eager = call(gm, module, x), module(x)
    assert ours.dtype == eager.dtype and torch.equal(ours, eager)
    assert same(gradients(ours, module, x), gradients(eager, module, x))


def test_grad_mode_and_autocast_are_the_callers_again_after_the_graph(stretch):
    module, gm = stretch
    with torch.autocast("cpu", torch.float16, enabled=False):
        call(gm, module, rows())
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.float16


def test_the_grad_mode_of_the_caller_does_not_change_what_is_captured(stretch):
    module, gm = stretch
    with torch.no_grad():
        captured_without_gradients = prepared(module, rows())
    assert graph_text(captured_without_gradients) == graph_text(gm)


def test_dynamo_traces_the_graph_again_with_free_sizes(stretch):
    torch._dynamo.reset()
    module, gm = stretch
    step = torch.compile(gm, backend="eager", fullgraph=True, dynamic=True)
    for x in (rows(4), rows(7)):
        ours, eager = step(*state_of(module).values(), x)[0], module(x)
        assert torch.equal(ours, eager)
        assert same(gradients(ours, module, x), gradients(eager, module, x))


def test_nothing_is_left_of_the_wrapped_bodies(stretch):
    _, gm = stretch
    assert not any(name.startswith("wrap_with") for name in operations(gm))
    assert [node.target for node in gm.graph.nodes if node.op == "get_attr"] == []
    assert list(gm.children()) == []


@pytest.mark.parametrize("forward", [detached, nested], ids=lambda forward: forward.__name__)
def test_the_graphs_of_two_equal_modules_have_the_same_text(forward):
    """Blocks share a graph by this text."""
    texts = []
    for module in (pair(forward), pair(forward)):
        leaves = [rows()]
        one = Call(module, (leaves[0],), {}, ("tuple", ("*",)), leaves, state_of(module))
        texts.append(make_graph(one, key_of(one)).text)
    assert texts[0] is not None and texts[0] == texts[1]


def test_a_second_run_changes_nothing(stretch):
    _, gm = stretch
    once = graph_text(gm)
    assert graph_text(run(gm, PREPARE)) == once


def test_a_graph_without_stretches_stays_as_it_is():
    gm = capture(pair(lambda m, x: m.b(m.a(x).tanh())), (rows(),), {}).gm
    before = list(gm.graph.nodes)
    run(gm, PREPARE)
    assert list(gm.graph.nodes) == before


def detached_in_autocast(m: Of, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            h = m.a(x)
        return m.b(h)


def detached_twice(m: Of, x: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        h = m.a(x)
        with torch.no_grad():
            h = m.a(h)
    return m.b(h.float())


@pytest.mark.parametrize("forward", [detached_in_autocast, detached_twice], ids=lambda forward: forward.__name__)
def test_no_grad_inside_autocast_is_either_refused_or_right(forward):
    """torch.export 2.13 drops the grad mode there without a word."""
    module, x = pair(forward), rows()
    try:
        gm = prepared(module, x)
    except CaptureError as error:
        assert "grad mode" in str(error)
        return
    assert same(gradients(call(gm, module, x), module, x), gradients(module(x), module, x))
