"""What a kept tensor is said to be for is what changes in backward when the tensor does."""

from __future__ import annotations

from typing import Any

import torch
from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx import GraphModule
from torch.nn import functional as F

from velora_fx.passes.kept_for_backward import kept_for_backward

few = settings(max_examples=25, deadline=None, derandomize=True)
ROWS, WIDTHS = (2, 3), (4, 6)
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


def backward_of(program: list[tuple[str, int]]) -> tuple[GraphModule, list[Any]]:
    """The backward graph that the partitioner makes, and what it is called with."""
    torch.manual_seed(0)
    x = torch.randn(*ROWS, WIDTHS[0], dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in (*SHAPES, *SHAPES)]
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
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    compiled(x, *weights).backward()
    return found[0], found[1]


@few
@given(steps)
def test_a_tensor_kept_for_gradients_alone_changes_those_and_no_other_output(program):
    gm, inputs = backward_of(program)
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
        assert changed - direct == {place for place, _ in entry.gradients_of}
        for place, width in entry.gradients_of:
            assert width == before[place].shape[0 if place > NUM_LINEAR else -1]


def test_the_uses_of_what_a_small_network_keeps() -> None:
    """Inputs of linears for the gradients of their weights (inputs 1 and 2), weights for the next product or for dx."""
    gm, _ = backward_of([("linear", 0), ("gelu", 0), ("linear", 1)])
    kept = kept_for_backward(gm).values()
    assert {entry.gradients_of: entry.operations for entry in kept if entry.gradients_of} == {
        ((0, 4),): (), ((1, 4),): (), ((2, 4),): ()
    }  # fmt: skip
    assert [entry.operations for entry in kept if not entry.gradients_of].count(("mm",)) == 1
