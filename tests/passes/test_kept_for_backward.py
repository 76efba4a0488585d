"""What a compiled backward needs each kept tensor for, in the graphs that AOTAutograd's partitioner makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch.fx import GraphModule
from torch.nn import functional as F

from tests.helpers.examples import for_any
from tests.helpers.graph_text import prepared
from tests.helpers.padding import padded_products
from tests.helpers.toys import Of
from velora_fx.capture import state_of
from velora_fx.passes.kept_for_backward import Kept, kept_for_backward

ROWS, WIDTH, HIDDEN = 12, 8, 16


def backward_of(module: nn.Module, *tensors: Tensor) -> GraphModule:
    """The backward graph of the module's forward, whose inputs are its parameters and then the tensors."""
    found: list[GraphModule] = []

    def compiler(gm: GraphModule, inputs: Any) -> Any:
        found.append(gm)
        return make_boxed_func(gm.forward)

    inputs = [*state_of(module).values(), *tensors]
    compiled = aot_module_simplified(
        prepared(module, *tensors),
        inputs,
        fw_compiler=lambda gm, inputs: make_boxed_func(gm.forward),
        bw_compiler=compiler,
        partition_fn=min_cut_rematerialization_partition,
    )
    compiled(*inputs)[0].sum().backward()
    return found[0]


def kept_by(gm: GraphModule, num_constants: int = 0) -> list[Kept]:
    """The uses of each kept tensor; the gradients that backward is given are none."""
    found = kept_for_backward(gm, num_constants)
    return [kept for name, kept in found.items() if not name.startswith("tangents")]


def widths(gm: GraphModule, num_constants: int = 0) -> dict[int, int]:
    """The width of the input of each product, by the number of its weight."""
    return {number: width for kept in kept_by(gm, num_constants) for number, _, width in kept.gradients_of}


class Linears(nn.Module):
    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH + 1, bias=False)
        self.transposed = nn.Parameter(torch.randn(WIDTH + 1, 5)) if transposed else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(F.gelu(self.up(x)))
        return y if self.transposed is None else y @ self.transposed


def test_inputs_of_linears_are_kept_for_the_gradients_of_their_weights_alone() -> None:
    kept = kept_by(backward_of(Linears(), torch.randn(ROWS, WIDTH)))
    assert Kept(((0, ROWS, WIDTH),), ()) in kept
    assert Kept(((1, ROWS, HIDDEN),), ()) in kept
    others = [use for use in kept if not use.gradients_of]
    assert {operation for use in others for operation in use.operations} >= {"gelu_backward", "mm"}


def test_the_width_is_that_of_the_input_also_where_the_weight_is_stored_transposed() -> None:
    names = [name for name, _ in Linears(transposed=True).named_parameters()]
    expected = {"transposed": WIDTH + 1, "up.weight": WIDTH, "down.weight": HIDDEN}
    found = widths(backward_of(Linears(transposed=True), torch.randn(ROWS, WIDTH)))
    assert found == {number: expected[name] for number, name in enumerate(names)}


def test_one_tensor_may_be_kept_for_several_weights_and_operations() -> None:
    a, b = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
    shared_input = Of(lambda m, x: m.a(x) * m.b(x) + x.cos().sum(), a=a, b=b)
    kept = kept_by(backward_of(shared_input, torch.randn(ROWS, WIDTH).requires_grad_()))
    (shared,) = [use for use in kept if len(use.gradients_of) > 1]
    assert sorted(shared.gradients_of) == [(0, ROWS, WIDTH), (1, ROWS, WIDTH)]
    assert shared.operations == ("sin",)


@pytest.mark.parametrize(("num_constants", "expected"), [(0, {0: WIDTH, 1: HIDDEN}), (1, {0: HIDDEN})])
def test_gradients_are_numbered_from_the_first_input_that_is_no_constant(
    num_constants: int, expected: dict[int, int]
) -> None:
    assert widths(backward_of(Linears(), torch.randn(ROWS, WIDTH)), num_constants) == expected


def test_the_graph_stays_as_it_is() -> None:
    gm = backward_of(Linears(), torch.randn(ROWS, WIDTH))
    before = gm.graph.python_code("self").src
    kept_for_backward(gm)
    assert gm.graph.python_code("self").src == before


LEADING, WIDTHS = (2, 3), (4, 6)
NUM_ROWS = 6
SHAPES = [(b, a) for a in WIDTHS for b in WIDTHS for _ in range(2)]
NUM_LINEAR = len(SHAPES)  # after the weights [O, D] of linears come those [D, O] of other products
ACTIONS = ("linear", "linear", "product", "gelu", "multiply", "residual", "transpose", "square")
steps = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 7)), min_size=1, max_size=6)


def forward(program: list[tuple[str, int]], x: Tensor, weights: list[Tensor]) -> Tensor:
    """A random network: mostly a chain, in which some operators take what earlier ones returned."""
    values = [x]
    for action, choice in program:
        h = values[-1 - max(0, choice - 3) % len(values)]
        same = [value for value in values if value.shape == h.shape]
        if action == "linear":
            own = [weight for weight in weights[:NUM_LINEAR] if weight.shape[1] == h.shape[-1]]
            h = F.linear(h, own[choice % len(own)])
        elif action == "product":
            own = [weight for weight in weights[NUM_LINEAR:] if weight.shape[0] == h.shape[-1]]
            h = h @ own[choice % len(own)]
        elif action == "transpose":
            h = h.transpose(0, 1).contiguous().transpose(0, 1)
        else:
            h = {
                "gelu": lambda h=h: F.gelu(h),
                "multiply": lambda h=h, same=same: h * same[-1],
                "residual": lambda h=h, same=same: h + same[0],
                "square": lambda h=h: h.square(),
            }[action]()
        values.append(h)
    return values[-1].sin().sum()


def padding_partition(gm: GraphModule, *args: Any, **options: Any) -> tuple[GraphModule, GraphModule]:
    """Inductor's partition of a graph whose products it has padded."""
    with padded_products():
        joint_graph_passes(gm)
    targets = {node.target for node in gm.graph.nodes}
    assert (torch.ops.aten.mm.default in targets) == (torch.ops.aten.constant_pad_nd.default in targets)
    parts: tuple[GraphModule, GraphModule] = min_cut_rematerialization_partition(gm, *args, **options)
    return parts


def partitioned(program: list[tuple[str, int]], is_padded: bool = False) -> tuple[GraphModule, list[Any]]:
    """The backward graph that the partitioner makes, and what it is called with."""
    torch.manual_seed(0)
    dtype = torch.float32 if is_padded else torch.float64  # products in float64 are never padded
    x = torch.randn(*LEADING, WIDTHS[0], dtype=dtype, requires_grad=True)
    weights = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in (*SHAPES, *SHAPES)]
    found: list[Any] = []

    def keep(gm: GraphModule, inputs: list[Any]) -> Any:
        def call(*args: Any) -> Any:
            found[:] = [gm, [arg.detach().clone() if isinstance(arg, Tensor) else arg for arg in args]]
            return gm(*args)

        return make_boxed_func(call)

    compiled = aot_function(
        lambda x, *weights: forward(program, x, list(weights)),
        fw_compiler=lambda gm, _: make_boxed_func(gm),
        bw_compiler=keep,
        partition_fn=padding_partition if is_padded else min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    compiled(x, *weights).backward()
    return found[0], found[1]


@pytest.mark.parametrize("is_padded", [False, True])
@for_any(program=steps, examples=25)
def test_a_tensor_kept_for_gradients_alone_changes_those_and_no_other_output(program, is_padded):
    gm, inputs = partitioned(program, is_padded)
    placeholders = gm.graph.find_nodes(op="placeholder")
    kept = kept_for_backward(gm)
    assert set(kept) == {node.name for node in placeholders}
    before = gm(*inputs)
    for number, node in enumerate(placeholders):
        entry = kept[node.name]
        if entry.operations:
            continue
        other = [value + 1 if index == number else value for index, value in enumerate(inputs)]
        changed = {
            place
            for place, (old, new) in enumerate(zip(before, gm(*other), strict=True))
            if old is not None and not torch.equal(old, new)
        }
        direct = {place for place, out in enumerate(gm.graph.output_node().args[0]) if out is node}
        assert changed - direct == {place for place, _, _ in entry.gradients_of}
        for place, num_rows, width in entry.gradients_of:
            assert width == before[place].shape[0 if place > NUM_LINEAR else -1]
            assert num_rows == NUM_ROWS or place == 0  # the gradient of x itself is one of a product with a weight


def test_the_uses_of_what_a_small_network_keeps() -> None:
    """Inputs of linears for the gradients of their weights (inputs 1 and 2), weights for the next product or for dx."""
    gm, _ = partitioned([("linear", 0), ("gelu", 0), ("linear", 1)])
    kept = kept_for_backward(gm).values()
    assert {entry.gradients_of: entry.operations for entry in kept if entry.gradients_of} == {
        ((0, 4, 4),): (), ((1, 6, 4),): (), ((2, 6, 4),): ()
    }  # fmt: skip
    assert [entry.operations for entry in kept if not entry.gradients_of].count(("mm",)) == 1
