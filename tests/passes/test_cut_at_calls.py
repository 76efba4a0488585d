"""A graph cut at calls of other code gives, run piece by piece, what the whole gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node

from tests.helpers.examples import for_any
from tests.helpers.graph_text import golden, graph_text, prepared
from velora_fx.passes.cut_at_calls import cut_at_calls

WIDTH = 8


class Around(nn.Module):
    """What a model does around two calls of a block, of which `alias` marks the arguments and `y0`, `y1` return."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor, y0: Tensor, y1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shift = x.cos()
        h = torch.ops.aten.alias.default(self.first(x).relu())
        g = torch.ops.aten.alias.default(y0 + shift)
        return self.last(y1), h, g


def outputs_of(gm: GraphModule) -> list[Node]:
    outputs: Any = gm.graph.output_node().args[0]
    return list(outputs)


def test_there_is_one_segment_more_than_calls_each_with_what_it_takes_and_gives() -> None:
    gm = prepared(Around(), *torch.zeros(3, 3, WIDTH))
    result, *markers = outputs_of(gm)
    segments = cut_at_calls(gm, [[marker] for marker in markers], [result])
    assert "\n".join(graph_text(segment.gm) for segment in segments) == golden(
        """
        %0: f32[s0, s1] = cos(%x)
        %1: f32[s0, 8] = linear(%x, %first.weight, %first.bias)
        %2: f32[s0, 8] = relu(%1)
        return (%0, %2)
        %0: f32[s0, 8] = add(%x, %cos)
        return (%0)
        %0: f32[s0, 2] = linear(%x, %last.weight, %last.bias)
        return (%0)
        """
    )
    assert segments[1].inputs[1] == segments[0].outputs[0]  # the shift is made before the first call, used after it


def test_without_calls_the_only_segment_is_the_graph() -> None:
    gm = prepared(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()), torch.zeros(3, WIDTH))
    (segment,) = cut_at_calls(gm, [], outputs_of(gm))
    assert graph_text(segment.gm) == graph_text(gm)


aten = torch.ops.aten
ACTIONS: dict[str, Any] = {
    "add": aten.add.Tensor, "multiply": aten.mul.Tensor, "negate": aten.neg.default, "view": aten.view.default,
    "transpose": aten.t.default, "add in place": aten.add_.Scalar, "clone": aten.clone.default,
}  # fmt: skip
programs = st.lists(
    st.tuples(st.sampled_from([*ACTIONS, "call", "call"]), st.integers(0, 20), st.integers(0, 20)), max_size=25
)


for_any_program = for_any(programs)


def traced(program: list[tuple[str, int, int]]) -> tuple[GraphModule, list[list[Node]], list[Node]]:
    """A graph of square matrices, as one of a whole model is: what calls return are placeholders, what they are given
    is marked by aliases."""
    graph, example = Graph(), torch.zeros(2, 2)
    values = [graph.placeholder(name) for name in ("x", "y")]
    returned = [graph.placeholder(f"returned_{k}") for k in range(sum(action == "call" for action, *_ in program))]
    markers: list[list[Node]] = []
    for action, first, second in program:
        a, b = values[first % len(values)], values[second % len(values)]
        if action == "call":
            markers.append([graph.call_function(aten.alias.default, (operand,)) for operand in (a, b)])
            values.append(returned[len(markers) - 1])
        else:
            operands = {"add": (a, b), "multiply": (a, b), "add in place": (a, 1.0), "view": (a, [2, 2])}.get(
                action, (a,)
            )
            values.append(graph.call_function(ACTIONS[action], operands))
    results = [value for value in values[-2:] if value.op == "call_function"]
    graph.output((*results, *(marker for call in markers for marker in call)))
    for node in graph.nodes:
        node.meta["val"] = example
    gm = GraphModule(nn.Module(), graph)
    gm.meta["state"] = {"x": "weight"}
    return gm, markers, results


def called(a: Tensor, b: Tensor) -> Tensor:
    """The code that is called between the segments."""
    return a.sin() + b.cos()


class Whole(Interpreter):
    """Runs the whole graph, with the calls made where they are marked."""

    def __init__(self, gm: GraphModule, markers: list[list[Node]]) -> None:
        super().__init__(gm)
        self.calls = {call[-1]: number for number, call in enumerate(markers)}
        self.markers = markers

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n in self.calls:
            number = self.calls[n]
            a, b = (self.env[marker] if marker is not n else result for marker in self.markers[number])
            placeholder = next(p for p in self.module.graph.nodes if p.name == f"returned_{number}")
            self.env[placeholder] = called(a, b)
        return result


@for_any_program
def test_the_segments_between_the_calls_do_what_the_whole_does(program):
    """Each with no more than it asks for: what it is given, what earlier segments gave out and what calls returned."""
    gm, markers, results = traced(program)
    torch.manual_seed(0)
    x, y = torch.rand(2, 2, dtype=torch.float64), torch.rand(2, 2, dtype=torch.float64)
    unknown = [torch.full((2, 2), float("nan"))] * len(markers)
    expected = Whole(gm, markers).run(x.clone(), y.clone(), *unknown)[: len(results)]
    values = {"x": x.clone(), "y": y.clone()}
    for number, segment in enumerate(cut_at_calls(gm, markers, results)):
        values.update(zip(segment.outputs, segment.gm(*(values[name] for name in segment.inputs)), strict=True))
        if number < len(markers):
            a, b = (values[marker.args[0].name] for marker in markers[number])  # type: ignore[union-attr]
            values[f"returned_{number}"] = called(a, b)
    for node, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(values[node.name], reference, rtol=0, atol=0)


@for_any_program
def test_a_segment_gives_out_what_is_taken_later_and_nothing_else(program):
    """What it kept besides would be in memory for no reason."""
    gm, markers, results = traced(program)
    segments = cut_at_calls(gm, markers, results)
    for number, segment in enumerate(segments):
        later = {name for other in segments[number + 1 :] for name in other.inputs}
        later |= {marker.args[0].name for call in markers[number:] for marker in call}  # type: ignore[union-attr]
        assert set(segment.outputs) <= later | {node.name for node in results}


@for_any_program
def test_every_node_is_in_one_segment_and_the_graph_stays_as_it_is(program):
    gm, markers, results = traced(program)
    before = str(gm.graph)
    segments = cut_at_calls(gm, markers, results)
    assert str(gm.graph) == before and len(segments) == len(markers) + 1
    bodies = [n.name for segment in segments for n in segment.gm.graph.nodes if n.op == "call_function"]
    aliases = {marker.name for call in markers for marker in call}
    assert bodies == [n.name for n in gm.graph.nodes if n.op == "call_function" and n.name not in aliases]
    assert all(segment.gm.meta["state"] == ({"x": "weight"} if "x" in segment.inputs else {}) for segment in segments)


@pytest.mark.parametrize("is_inside", [True, False])
def test_a_call_within_a_stretch_without_gradients_is_refused(is_inside: bool) -> None:
    graph = Graph()
    x = graph.placeholder("x")
    marker = None if is_inside else graph.call_function(aten.alias.default, (x,))
    graph.call_function(torch._C._set_grad_enabled, (False,))
    marker = marker or graph.call_function(aten.alias.default, (x,))
    graph.call_function(torch._C._set_grad_enabled, (True,))
    graph.output((x,))
    gm = GraphModule(nn.Module(), graph)
    gm.meta["state"] = {}
    if is_inside:
        with pytest.raises(ValueError, match="within a no_grad or autocast stretch"):
            cut_at_calls(gm, [[marker]], [])
    else:
        assert len(cut_at_calls(gm, [[marker]], [])) == 2
