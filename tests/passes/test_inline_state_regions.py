"""Grad-mode and autocast stretches of a forward stay what they are when the captured graph runs."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.fx import GraphModule

from tests.helpers.graph_text import call, gradients, graph_text, operations, prepared, same
from velora_fx.capture import Call, CaptureError, key_of, make_graph, state_of
from velora_fx.capture.export import capture
from velora_fx.passes import PREPARE, run


class Pair(nn.Module):
    """Two linears; subclasses say in which state each runs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)


class Plain(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


class Detached(Pair):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.a(x).tanh()
        return self.b(h)


class EnabledInside(Pair):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.a(x)
            with torch.enable_grad():
                g = self.b(h)
            h = h * 2
        return h + g


class FullPrecision(Pair):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            h = self.a(x.float()).exp()
        return self.b(h)


class LowPrecision(Pair):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = self.b(h)
        return y.float() + h


class Nested(Pair):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = self.a(x)
            with torch.autocast("cpu", enabled=False):
                y = self.b(h.float())
            z = self.a(y)
        return y + z.float()


class LowPrecisionDetached(Pair):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.a(x)
            with torch.autocast("cpu", torch.bfloat16):
                g = self.a(h)
        return self.b(h * g.float())


class TwoResults(Pair):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            mean, spread = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return self.b(self.a((x - mean) / spread))


class Inner(Pair):
    """A stretch that comes with a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Detached()
        self.second = LowPrecision()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.b(self.first(self.a(x))))


STRETCHES = (
    Detached, EnabledInside, FullPrecision, LowPrecision, Nested, LowPrecisionDetached, TwoResults, Inner,
)  # fmt: skip


@pytest.fixture(scope="module", params=STRETCHES, ids=lambda kind: kind.__name__)
def stretch(request: pytest.FixtureRequest) -> tuple[Pair, GraphModule]:
    """A module with a stretch, and its graph captured with four rows."""
    module = request.param()
    return module, prepared(module, rows(4))


def rows(count: int = 4) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(count)).requires_grad_()


def test_a_no_grad_stretch_becomes_nodes_that_set_and_reset_the_grad_mode():
    assert_expected_inline(
        graph_text(prepared(Detached(), rows())),
        """\
_set_grad_enabled(False)
%0: f32[s0, 8] = linear(%x, %a.weight, %a.bias)
%1: f32[s0, 8] = tanh(%0)
_set_grad_enabled(True)
%2: f32[s0, 8] = linear(%1, %b.weight, %b.bias)
return (%2)""",
    )


def test_enable_grad_inside_no_grad_splits_the_stretch():
    assert_expected_inline(
        graph_text(prepared(EnabledInside(), rows())),
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


def test_an_autocast_stretch_becomes_nodes_that_enter_and_exit_it():
    assert_expected_inline(
        graph_text(prepared(LowPrecision(), rows())),
        """\
%0: f32[s0, 8] = linear(%x, %a.weight, %a.bias)
%1 = _enter_autocast('cpu', bfloat16, True, True)
%2: bf16[s0, 8] = linear(%0, %b.weight, %b.bias)
_exit_autocast(%1)
%3: f32[s0, 8] = to(%2, float32)
%4: f32[s0, 8] = add(%3, %0)
return (%4)""",
    )


def test_a_stretch_without_autocast_is_kept_where_the_caller_has_none():
    assert_expected_inline(
        graph_text(prepared(FullPrecision(), rows())),
        """\
%0 = _enter_autocast('cpu', bfloat16, False, True)
%1: f32[s0, s1] = to(%x, float32)
%2: f32[s0, 8] = linear(%1, %a.weight, %a.bias)
%3: f32[s0, 8] = exp(%2)
_exit_autocast(%0)
%4: f32[s0, 8] = linear(%3, %b.weight, %b.bias)
return (%4)""",
    )


def test_nested_autocast_stretches_stay_nested():
    assert_expected_inline(
        graph_text(prepared(Nested(), rows())),
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
        graph_text(prepared(LowPrecisionDetached(), rows())),
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


def test_no_gradient_flows_out_of_a_no_grad_stretch():
    module, x = Detached(), rows()
    of_a_weight, of_a_bias, of_b_weight, _, of_x = gradients(call(prepared(module, x), module, x), module, x)
    assert of_a_weight is None and of_a_bias is None and of_x is None
    assert of_b_weight is not None


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


@pytest.mark.parametrize("kind", [Detached, Nested], ids=lambda kind: kind.__name__)
def test_the_graphs_of_two_equal_modules_have_the_same_text(kind):
    """Blocks share a graph by this text."""
    texts = []
    for module in (kind(), kind()):
        leaves = [rows()]
        one = Call(module, (leaves[0],), {}, ("tuple", ("*",)), leaves, state_of(module))
        texts.append(make_graph(one, key_of(one)).text)
    assert texts[0] is not None and texts[0] == texts[1]


def test_a_second_run_changes_nothing(stretch):
    _, gm = stretch
    once = graph_text(gm)
    assert graph_text(run(gm, PREPARE)) == once


def test_a_graph_without_stretches_stays_as_it_is():
    gm = capture(Plain(), (rows(),), {}).gm
    before = list(gm.graph.nodes)
    run(gm, PREPARE)
    assert list(gm.graph.nodes) == before


class DetachedInAutocast(Pair):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                h = self.a(x)
            return self.b(h)


class DetachedTwice(Pair):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            h = self.a(x)
            with torch.no_grad():
                h = self.a(h)
        return self.b(h.float())


@pytest.mark.parametrize("kind", [DetachedInAutocast, DetachedTwice], ids=lambda kind: kind.__name__)
def test_no_grad_inside_autocast_is_either_refused_or_right(kind):
    """torch.export 2.13 drops the grad mode there without a word."""
    module, x = kind(), rows()
    try:
        gm = prepared(module, x)
    except CaptureError as error:
        assert "grad mode" in str(error)
        return
    assert same(gradients(call(gm, module, x), module, x), gradients(module(x), module, x))
