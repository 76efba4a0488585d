"""Chosen linears become VeLoRA operators: the forward and all other gradients stay, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from tests.helpers.gradients import saved_by
from tests.helpers.graph_text import graph_text, operations, prepared
from tests.helpers.toys import Of
from velora_fx.capture import state_of
from velora_fx.passes import run
from velora_fx.passes.swap import Carrier, Choice, swap

WIDTH, SIZE = 8, 4


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(WIDTH, 12, bias=False), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = x.tanh()
        return self.down(F.silu(self.gate(h)) * self.up(h))


DOWN = {"down": Choice("down.input", SIZE)}
BOTH = {"gate": Choice("gate.input", SIZE), "up": Choice("gate.input", SIZE)}
ALL = {**BOTH, **DOWN}
WIDTHS = {"gate.input": WIDTH, "up.input": WIDTH, "down.input": 12, "a.input": WIDTH}


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1), dtype=dtype).requires_grad_()


def swapped(module: nn.Module, choices: Mapping[str, Choice], x: Tensor | None = None) -> GraphModule:
    return run(prepared(module, rows() if x is None else x), [partial(swap, choices=choices)])


def inputs_of(gm: GraphModule) -> list[str]:
    return [node.name for node in gm.graph.nodes if node.op == "placeholder"]


def projections(choices: Mapping[str, Choice], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A unit row for each group of each tensor, by the tensor's name, in the order of the graph's inputs."""
    generator = torch.Generator().manual_seed(2)
    shapes = {choice.tensor: (WIDTHS[choice.tensor] // SIZE, SIZE) for choice in choices.values()}
    return {
        name: F.normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=1)
        for name, shape in shapes.items()
    }


def result(gm: GraphModule, module: nn.Module, choices: Mapping[str, Choice], x: Tensor) -> Tensor:
    y: Tensor = gm(*state_of(module).values(), x, *projections(choices, x.dtype).values())[0]
    return y


def parameter_gradients(y: Tensor, module: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """The gradients by parameter name, and that of x as "x"."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad} | {"x": x}
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
    return dict(zip(named, torch.autograd.grad(y, list(named.values()), upstream, allow_unused=True), strict=True))


def test_a_linear_becomes_compress_and_velora_linear():
    gm = prepared(Mlp(), rows())
    assert_expected_inline(
        graph_text(gm),
        """\
%0: f32[s0, s1, s2] = tanh(%x)
%1: f32[s0, s1, 12] = linear(%0, %gate.weight, %gate.bias)
%2: f32[s0, s1, 12] = silu(%1)
%3: f32[s0, s1, 12] = linear(%0, %up.weight)
%4: f32[s0, s1, 12] = mul(%2, %3)
%5: f32[s0, s1, 8] = linear(%4, %down.weight, %down.bias)
return (%5)""",
    )
    run(gm, [partial(swap, choices=DOWN)])
    assert_expected_inline(
        graph_text(gm),
        """\
%0: f32[s0, s1, s2] = tanh(%x)
%1: f32[s0, s1, 12] = linear(%0, %gate.weight, %gate.bias)
%2: f32[s0, s1, 12] = silu(%1)
%3: f32[s0, s1, 12] = linear(%0, %up.weight)
%4: f32[s0, s1, 12] = mul(%2, %3)
%5 = velora.compress(%4, %projection_0)
%6: f32[s0, s1, 8] = velora.linear(%4, %down.weight, %down.bias, %5, %projection_0, None)
return (%6)""",
    )


def test_a_carrier_is_given_to_the_linear_and_transposed_where_its_weight_is():
    carrier = Carrier("down.weight", 1)
    gm = swapped(Mlp(), {"down": Choice("down.input", SIZE, carrier)})
    assert carrier.name == "down.weight_carrier"
    assert inputs_of(gm)[-2:] == ["carrier_0", "projection_0"]
    assert "velora.linear(%4, %down.weight, %down.bias, %5, %projection_0, %carrier_0)" in graph_text(gm)
    turned = graph_text(swapped(Mlp(), {"down": Choice("down.input", SIZE, Carrier("down.weight", 0))}))
    assert "= t(%carrier_0)" in turned and "%projection_0, %carrier_0)" not in turned


@pytest.mark.parametrize(("choices", "num_linears"), [(BOTH, 2), ({"up": Choice("up.input", SIZE)}, 1)])
def test_linears_of_one_input_share_its_projections_and_one_of_them_can_be_left_dense(choices, num_linears):
    found = operations(swapped(Mlp(), choices))
    assert (found["velora.compress"], found["velora.linear"], found["linear"]) == (1, num_linears, 3 - num_linears)


def test_inputs_of_one_name_that_are_different_tensors_get_projections_each():
    """The second use of a linear, or q, k and v under autocast."""

    twice = Of(lambda m, x: m.a(m.a(x).tanh()), a=nn.Linear(WIDTH, WIDTH))
    choices = {"a": Choice("a.input", SIZE), "a#2": Choice("a.input", SIZE)}
    gm = swapped(twice, choices)
    assert operations(gm)["velora.compress"] == 2
    assert len(projections(choices)) == len([n for n in gm.graph.nodes if n.name.startswith("projection")]) == 1


def test_the_projections_are_the_last_inputs_in_the_order_of_the_choices():
    gm = swapped(Mlp(), {**DOWN, **BOTH})
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    readers = {str(user.args[0]): node.name for node in inputs[-2:] for user in node.users if "compress" in user.name}
    assert [node.name for node in inputs[-2:]] == ["projection_0", "projection_1"]
    assert readers == {"tanh": "projection_1", "mul": "projection_0"}


def test_a_consumer_that_the_graph_does_not_have_is_ignored():
    found = operations(swapped(Mlp(), {**DOWN, "other": Choice("down.input", SIZE)}))
    assert found == operations(swapped(Mlp(), DOWN))


def test_a_product_that_is_no_linear_is_ignored():
    stack = Of(lambda m, x: torch.bmm(x, m.w), w=nn.Parameter(torch.zeros(3, WIDTH, WIDTH)))
    assert operations(swapped(stack, {"w": Choice("down.input", SIZE)})) == {"bmm": 1}


def test_without_choices_the_graph_stays_as_it_is():
    gm = prepared(Mlp(), rows())
    before = graph_text(gm)
    assert graph_text(run(gm, [partial(swap, choices={})])) == before


each_choice = pytest.mark.parametrize("choices", [DOWN, BOTH, ALL], ids=["one", "two of one input", "all"])


@each_choice
def test_a_second_run_changes_nothing(choices):
    gm = swapped(Mlp(), choices)
    once = graph_text(gm), inputs_of(gm)
    run(gm, [partial(swap, choices=choices)])
    assert (graph_text(gm), inputs_of(gm)) == once


@each_choice
def test_the_output_and_all_other_gradients_are_bit_equal_to_eager(choices):
    module, x = Mlp(), rows()
    ours, eager = result(swapped(module, choices), module, choices, x), module(x)
    assert torch.equal(ours, eager)
    approximate = {f"{consumer}.weight" for consumer in choices}
    expected = parameter_gradients(eager, module, x)
    for name, gradient in parameter_gradients(ours, module, x).items():
        assert torch.equal(gradient, expected[name]) != (name in approximate), name


def test_each_weight_gradient_is_that_of_the_rebuilt_true_input():
    """In float64: dW = dYᵀ x̂ with x̂ the sub-tokens of the linear's own input projected on v (paper, section 3.1)."""
    module, x = Mlp().double(), rows(torch.float64)
    ours = parameter_gradients(result(swapped(module, ALL, x), module, ALL, x), module, x)
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    for name, child in module.named_children():
        child.register_forward_hook(lambda _, args, y, name=name: inputs.update({name: args[0]}) or y)
        child.register_full_backward_hook(lambda _, __, dy, name=name: outputs.update({name: dy[0]}))
    parameter_gradients(module(x), module, x)
    for name, choice in ALL.items():
        v = projections(ALL, torch.float64)[choice.tensor]
        sub_tokens = inputs[name].detach().unflatten(-1, v.shape)
        rebuilt = ((sub_tokens * v).sum(-1, keepdim=True) * v).flatten(-2)
        truth = outputs[name].flatten(0, 1).t() @ rebuilt.flatten(0, 1)
        torch.testing.assert_close(ours[f"{name}.weight"], truth, rtol=1e-12, atol=1e-12)


def test_a_frozen_weight_gets_no_gradient_and_lets_the_inputs_through():
    module, x = Mlp(), rows()
    module.down.weight.requires_grad_(False)
    ours = parameter_gradients(result(swapped(module, DOWN), module, DOWN, x), module, x)
    expected = parameter_gradients(module(x), module, x)
    assert ours.keys() == expected.keys() and "down.weight" not in ours
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


@pytest.mark.parametrize(("choices", "is_kept"), [(ALL, False), (BOTH, True)], ids=["all", "down is dense"])
def test_nothing_of_the_input_is_kept_for_backward(choices, is_kept):
    module, x = Mlp(), rows()
    gm = swapped(module, choices)
    kept = saved_by(lambda: result(gm, module, choices, x))
    # tanh keeps its result, which is the input of gate and up; the product that down reads is kept by nobody.
    product = F.silu(module.gate(x.tanh())) * module.up(x.tanh())
    same = [t for t in kept if t.numel() == product.numel() and torch.equal(t.reshape(product.shape), product)]
    assert bool(same) == is_kept
