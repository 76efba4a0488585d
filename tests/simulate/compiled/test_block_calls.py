"""The calls of blocks: recorded, left out of a trace, and sorted into those compiled apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.utils.checkpoint import checkpoint

from tests.helpers.toys import Stack, rows, stack
from velora_fx.analyse.trial import probe
from velora_fx.capture import CaptureError
from velora_fx.simulate import Tracker, fake_copy, fake_mode, simulate_forward
from velora_fx.simulate.compiled import inner_calls
from velora_fx.simulate.compiled.block_calls import BlockCall, record, replay


def calls(kinds: str) -> list[BlockCall]:
    """A call for each letter, equal ones with one graph; "-" has none."""
    graphs = {kind: None if kind == "-" else GraphModule(nn.Module(), Graph()) for kind in kinds}
    return [BlockCall(str(number), gm=graphs[kind]) for number, kind in enumerate(kinds)]


@pytest.mark.parametrize(
    ("kinds", "apart"),
    [
        ("", ""),
        ("aaaaaaaaaaaa", "............"),
        ("aaaaaaaaaaaaa", ".xxxxxxxxxxx."),
        ("aaaaaaabbbbbbb", ".xxxxxxxxxxxx."),
        ("aa-aaaaaaaaaaa", ".x.xxxxxxxxxx."),
    ],
)
def test_calls_between_the_first_and_the_last_are_compiled_apart(kinds: str, apart: str) -> None:
    found = inner_calls(calls(kinds))
    assert "".join("x" if number in found else "." for number in range(len(kinds))) == apart


def faked(model: nn.Module) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """A fake copy, a fake input, and the graphs of its blocks."""
    mode, device = fake_mode(), torch.device("cpu")

    def traced(fake: nn.Module, _: Tracker) -> None:
        simulate_forward(fake, *fake_copy(((rows(),), {}), mode, device, real="none"), device)

    findings = probe(fake_copy(model, mode, device, "none"), traced, Tracker(), lambda text: None)
    return fake_copy(model, mode, device, "none"), fake_copy(rows(), mode, device, "none"), dict(findings.graphs)


def test_each_call_is_recorded_with_its_graph_its_state_and_what_it_returns() -> None:
    fake, x, graphs = faked(stack())
    recorded = record(fake, (x,), {}, graphs)
    assert [call.name for call in recorded] == ["blocks.0", "blocks.1", "blocks.2"]
    assert len({id(call.gm) for call in recorded}) == 1
    assert "blocks.1.up.weight" in recorded[1].state
    assert recorded[0].num_tensors == 1 and recorded[0].outputs[0].shape == rows().shape
    assert all("forward" not in vars(block) for block in fake.blocks)  # type: ignore[union-attr]


def test_a_block_without_a_graph_is_recorded_as_one_that_is_not_left_out() -> None:
    fake, x, graphs = faked(stack())
    del graphs["blocks.1"]
    assert [call.graph is None for call in record(fake, (x,), {}, graphs)] == [False, True, False]


def test_replayed_calls_return_what_they_are_given_and_mark_what_they_are_called_with() -> None:
    fake, x, graphs = faked(stack())
    recorded = record(fake, (x,), {}, graphs)
    outputs = [torch.empty_like(recorded[0].outputs[0]) for _ in recorded]
    taken = []
    fake.head.register_forward_pre_hook(lambda module, args: taken.append(args[0]))  # type: ignore[union-attr]
    with replay(fake, recorded, outputs) as marked:
        fake(x)
    assert taken[0] is outputs[-1]
    assert [m.untyped_storage()._cdata for m in marked] == [
        t.untyped_storage()._cdata for t in (x, outputs[0], outputs[1])
    ]


def test_a_trace_that_goes_another_way_than_the_record_is_refused() -> None:
    fake, x, graphs = faked(stack())
    recorded = record(fake, (x,), {}, graphs)
    other_way = r"blocks\.0 is called in tracing where otherwise blocks\.1 is"
    with pytest.raises(CaptureError, match=other_way), replay(fake, recorded[1:], [recorded[0].outputs[0]] * 2):
        fake(x)


class OddlyCheckpointed(Stack):
    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        x = checkpoint(torch.sin, x, use_reentrant=False)
        return super().forward(x)


def test_a_checkpoint_around_something_else_than_a_block_is_refused() -> None:
    torch.manual_seed(0)
    fake, x, graphs = faked(OddlyCheckpointed(2).train())
    recorded = record(fake, (x,), {}, graphs)
    outputs = [call.outputs[0] for call in recorded]
    something = "checkpoints something else than its repeated blocks"
    with pytest.raises(CaptureError, match=something), replay(fake, recorded, outputs):
        fake(x)
