"""What Inductor makes of the operators: small products, one projection for several linears, and no input rebuilt."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import prod
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.fx import Graph, Node
from torch.nn import functional as F

from velora_fx.ops import sign_projection
from velora_fx.ops.velora import compress, linear

ROWS, WIDTH, INNER, SIZE = 96, 64, 160, 16


class Block(nn.Module):
    """A norm whose output three linears read, and a product that another reads, as in a Llama block."""

    def __init__(self, compresses: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.compresses = compresses
        self.norm = nn.RMSNorm(WIDTH)
        self.gate, self.up, self.value = (nn.Parameter(torch.randn(INNER, WIDTH)) for _ in range(3))
        self.down = nn.Parameter(torch.randn(WIDTH, INNER))
        self.v_in = sign_projection(0, "", "in", WIDTH // SIZE, SIZE)
        self.v_inner = sign_projection(0, "", "inner", INNER // SIZE, SIZE)

    def forward(self, h: Tensor) -> Tensor:
        x = self.norm(h)
        gate, up, value = self.products(x, self.v_in, self.gate, self.up, self.value)
        (down,) = self.products(F.silu(gate) * up + value, self.v_inner, self.down)
        return h + down

    def products(self, x: Tensor, v: Tensor, *weights: Tensor) -> list[Tensor]:
        """The linears of one input."""
        if not self.compresses:
            return [F.linear(x, weight) for weight in weights]
        z = compress(x, v)
        return [linear(x, weight, None, z, v, None) for weight in weights]


def compiled_step(compresses: bool) -> SimpleNamespace:
    """The graphs and the code of a compiled forward and backward, and what the forward saves."""
    torch._dynamo.reset()
    graphs: list[Graph] = []
    result = SimpleNamespace(graphs=graphs, saved=[])
    block, h = Block(compresses), torch.randn(2, ROWS // 2, WIDTH, requires_grad=True)
    step = torch.compile(block, fullgraph=True)

    def run() -> None:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: result.saved.append(t) or t, lambda t: t):
            loss = step(h).square().sum()
        loss.backward()

    with fresh_cache(), config.patch(post_grad_custom_post_pass=kept_in(graphs)):
        _, result.code = run_and_get_code(run)
    result.gradients = {name: parameter.grad for name, parameter in block.named_parameters()} | {"h": h.grad}
    return result


def kept_in(graphs: list[Graph]) -> Callable[[Graph], None]:
    def keep(graph: Graph) -> None:
        copy = Graph()
        copy.graph_copy(graph, {})
        graphs.append(copy)

    return keep


@pytest.fixture(scope="module")
def steps() -> SimpleNamespace:
    return SimpleNamespace(dense=compiled_step(False), ours=compiled_step(True))


def shapes_of(node: Node) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(operand.meta["val"].shape) for operand in node.all_input_nodes)


def products_over_rows(graph: Graph) -> list[tuple[tuple[int, ...], ...]]:
    """The operands of matrix products that sum over the rows of a batch: those of weight gradients."""
    found = (shapes_of(node) for node in graph.nodes if node.target is torch.ops.aten.mm.default)
    return sorted(shapes for shapes in found if shapes[0][1] == ROWS)


def buffers(code: str) -> list[tuple[int, ...]]:
    """The shapes of what generated code allocates."""
    found = re.findall(r"empty_strided_cpu\(\(([\d, ]+)\)", code)
    return [tuple(int(number) for number in text.split(",") if number.strip()) for text in found]


def test_products_of_weight_gradients_are_smaller_by_the_size_of_sub_tokens(steps):
    dense, ours = (products_over_rows(step.graphs[-1]) for step in (steps.dense, steps.ours))
    assert dense == sorted([((INNER, ROWS), (ROWS, WIDTH))] * 3 + [((WIDTH, ROWS), (ROWS, INNER))])
    assert ours == sorted(((out, ROWS), (ROWS, width // SIZE)) for (out, _), (_, width) in dense)


def test_an_input_that_three_linears_read_is_projected_once(steps):
    sums = [
        node
        for graph in steps.ours.graphs
        for node in graph.nodes
        if node.target is torch.ops.aten.sum.dim_IntList
        and node.meta["val"].shape[-1] in (WIDTH // SIZE, INNER // SIZE)
    ]
    assert sorted(node.meta["val"].shape[-1] for node in sums) == [WIDTH // SIZE, INNER // SIZE]


def test_no_input_of_a_compressed_linear_is_saved(steps):
    """The norm's output and the inner product are: both by the dense step, neither by ours."""
    dense, ours = (
        sorted(t.numel() for t in step.saved if t.numel() >= ROWS * WIDTH) for step in (steps.dense, steps.ours)
    )
    freed = list(dense)
    for size in ours:
        freed.remove(size)
    assert freed == [ROWS * WIDTH, ROWS * INNER]


def test_the_generated_backward_makes_no_tensor_of_the_inputs_size_that_the_dense_one_does_not(steps):
    for size in (ROWS * WIDTH, ROWS * INNER):
        dense, ours = (
            sum(prod(shape) == size for shape in buffers(step.code[-1])) for step in (steps.dense, steps.ours)
        )
        assert ours <= dense


def test_the_generated_code_calls_no_velora_operator(steps):
    assert len(steps.ours.code) == 2
    assert not any("torch.ops.velora" in code for code in steps.ours.code)


def test_all_but_the_compressed_gradients_are_those_of_the_dense_step(steps):
    for name, gradient in steps.dense.gradients.items():
        ours = steps.ours.gradients[name]
        assert torch.allclose(ours, gradient, rtol=1e-4, atol=1e-3) == (name in ("h", "norm.weight")), name
