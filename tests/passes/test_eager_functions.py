"""The eager form of a graph does what the graph does, operator by operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.graph_text import golden, graph_text, prepared
from velora_fx.ops import velora
from velora_fx.passes import run
from velora_fx.passes.eager_functions import DIRECT, for_eager
from velora_fx.passes.swap import Choice, swap

aten = torch.ops.aten


class Layer(nn.Module):
    """Two linears that read one input, and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.gate(x)) + self.up(x))  # type: ignore[no-any-return]


def swapped() -> torch.fx.GraphModule:
    choices = {name: Choice(tensor, 4) for name, tensor in {"gate": "gate", "up": "gate", "down": "down"}.items()}
    return run(prepared(Layer(), torch.ones(3, 16)), [lambda gm: swap(gm, choices)])


def test_operators_become_functions_and_a_linear_makes_the_projections_that_it_alone_takes() -> None:
    gm = swapped()
    before = graph_text(gm)
    assert graph_text(for_eager(gm)) == golden("""
        %0 = _compress(%x, %projection_0)
        %1: f32[s0, 8] = _linear(%x, %gate.weight, %gate.bias, %0, %projection_0, None)
        %2: f32[s0, 8] = gelu(%1)
        %3: f32[s0, 8] = _linear(%x, %up.weight, %up.bias, %0, %projection_0, None)
        %4: f32[s0, 8] = add(%2, %3)
        %5: f32[s0, 4] = _linear(%4, %down.weight, %down.bias, None, %projection_1, None)
        return (%5)
        """)
    assert graph_text(gm) == before


def _without_values(value: Any) -> Any:
    return type(value) if isinstance(value, Tensor) else value


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which operators run, with which arguments but for tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen.append((func, *torch.fx.node.map_aggregate((args, kwargs), _without_values)))
        return result


X = torch.linspace(0.1, 2, 24).view(2, 3, 4)
OPERANDS: dict[Any, tuple[tuple[Any, ...], dict[str, Any]]] = {
    aten.add.Tensor: ((X, 2.0), {"alpha": 3}),
    aten.cat.default: (([X, X], 1), {}),
    aten.contiguous.default: ((X.transpose(0, 1),), {"memory_format": torch.contiguous_format}),
    aten.div.Tensor: ((X, X + 1), {}),
    aten.dropout.default: ((X, 0.5, True), {}),
    aten.gelu.default: ((X,), {"approximate": "tanh"}),
    aten.layer_norm.default: ((X, [4], X[0, 0], None, 1e-3, False), {}),
    aten.linear.default: ((X, X[0], X[0, :, 0]), {}),
    aten.mean.dim: ((X, [-1], True), {"dtype": torch.float64}),
    aten.mul.Tensor: ((X, X), {}),
    aten.neg.default: ((X,), {}),
    aten.permute.default: ((X, [2, 0, 1]), {}),
    aten.pow.Tensor_Scalar: ((X, 3), {}),
    aten.relu.default: ((X,), {}),
    aten.reshape.default: ((X.transpose(0, 1), [2, -1]), {}),
    aten.rsqrt.default: ((X,), {}),
    aten.scaled_dot_product_attention.default: ((X, X, X, None, 0.0, True), {"scale": 0.25}),
    aten.silu.default: ((X,), {}),
    aten.sym_size.int: ((X, 1), {}),
    aten.to.dtype: ((X, torch.bfloat16), {}),
    aten.transpose.int: ((X, 1, 2), {}),
    aten.type_as.default: ((X, X.double()), {}),
    aten.unsqueeze.default: ((X, 1), {}),
    aten.view.default: ((X, [6, -1]), {}),
}


@pytest.mark.parametrize("operator", [operator for operator in DIRECT if operator not in velora.FUNCTIONS], ids=str)
def test_a_function_runs_the_operator_that_it_stands_for(operator: Callable[..., Any]) -> None:
    args, kwargs = OPERANDS[operator]
    found = []
    for call in (operator, DIRECT[operator]):
        torch.manual_seed(0)
        with Operators() as operators:
            result = call(*args, **kwargs)
        found.append((operators.seen, result))
    (expected, theirs), (got, ours) = found
    assert got == expected
    assert torch.equal(ours, theirs) if isinstance(theirs, Tensor) else ours == theirs
