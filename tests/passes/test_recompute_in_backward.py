"""A graph under checkpointing: the same values, and less kept by the partitioner."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from functorch.compile import aot_function, min_cut_rematerialization_partition, nop
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from tests.helpers.graph_text import graph_text, prepared
from velora_fx.capture import state_of
from velora_fx.passes.recompute_in_backward import recompute_in_backward
from velora_fx.runtime import CONTEXTS


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def kept_bytes(gm: GraphModule, inputs: list[Tensor]) -> tuple[int, list[Tensor]]:
    """Bytes that the partitioner keeps besides inputs, and the gradients of all inputs."""
    found: list[int] = []

    def forward(graph: GraphModule, example_inputs: Any) -> Any:
        outputs = graph.graph.output_node().args[0][1:]
        kept = [node.meta["val"] for node in outputs if node.op != "placeholder"]
        found.append(sum(v.numel() * v.itemsize for v in kept if isinstance(v, torch.Tensor)))
        return nop(graph, example_inputs)

    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    compiled = aot_function(lambda *args: gm(*args)[0], forward, nop, partition_fn=min_cut_rematerialization_partition)
    compiled(*leaves).square().sum().backward()
    return found[0], [leaf.grad for leaf in leaves if leaf.grad is not None]


def test_the_graph_becomes_the_body_of_one_checkpoint() -> None:
    gm = prepared(nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU()), torch.randn(8, 4))
    before = graph_text(gm)
    whole = recompute_in_backward(gm, None)
    assert_expected_inline(
        graph_text(whole),
        """\
%0 = body
%1 = higher_order.tag_activation_checkpoint(%0, %0.weight, %x, use_reentrant=False, preserve_rng_state=True)
%2 = getitem(%1, 0)
return (%2)""",
    )
    assert graph_text(gm) == graph_text(whole.body) == before


@pytest.mark.parametrize("recompute", ["pointwise", "all"])
def test_gradients_stay_and_what_is_kept_shrinks(recompute: Any) -> None:
    module, x = Mlp(), torch.randn(8, 16)
    gm = prepared(module, x)
    inputs = [*state_of(module).values(), x]
    untouched, expected = kept_bytes(gm, inputs)
    kept, gradients = kept_bytes(recompute_in_backward(gm, CONTEXTS[recompute]), inputs)
    torch.testing.assert_close(gradients, expected)
    assert kept < untouched
    products = 8 * 32 * 4  # the outputs of `up`; that of `down` is not needed
    assert kept == (products if recompute == "pointwise" else 0)
