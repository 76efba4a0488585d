"""A compiled model as autograd sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import GradientEdge, get_gradient_edge

Run = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]


class OneGraph(torch.autograd.Function):
    """Runs `run(tensors)` as one node of autograd, whatever graphs it is made of.

    The gradients of all parameters are there when its backward ends. An output that no loss uses gets a gradient of
    zeros when it begins.
    """

    @staticmethod
    def forward(ctx: Any, run: Run, *tensors: Any) -> Any:
        ctx.set_materialize_grads(False)
        leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
        with torch.enable_grad():
            outputs = run(leaves)
        ctx.leaves = [get_gradient_edge(leaf) if leaf.requires_grad else None for leaf in leaves]
        ctx.outputs = [_Output.of(output) if output.requires_grad else None for output in outputs]
        results = tuple(output.detach() for output in outputs)
        ctx.mark_non_differentiable(*(r for r, output in zip(results, ctx.outputs, strict=True) if output is None))
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        edges, given = [], []
        for output, gradient in zip(ctx.outputs, gradients, strict=True):
            if gradient is not None:
                edges.append(output.edge)
                given.append(gradient)
            elif output is not None:
                output.hold_zeros()
        del gradients
        wanted = [leaf for leaf in ctx.leaves if leaf is not None]
        found = iter(torch.autograd.grad(edges, wanted, given, allow_unused=True))
        return None, *(None if leaf is None else next(found) for leaf in ctx.leaves)


@dataclass(frozen=True)
class _Output:
    """What is needed of an output in backward, without holding it."""

    edge: GradientEdge
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    mode: FakeTensorMode

    @classmethod
    def of(cls, tensor: Any) -> _Output:
        return cls(get_gradient_edge(tensor), tensor.shape, tensor.dtype, tensor.device, tensor.fake_mode)

    def hold_zeros(self) -> None:
        """Holds a gradient of zeros until the backward of the output's own graph, which makes one itself."""
        with self.mode:
            held = [torch.zeros(self.shape, dtype=self.dtype, device=self.device)]
        self.edge.node.register_prehook(lambda gradients: held.clear())
