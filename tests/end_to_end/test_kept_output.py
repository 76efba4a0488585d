"""A loop that keeps the model's output, and a loss that is not known: the report has a word on both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import velora_fx
from tests.helpers.allocator import peak_of
from tests.helpers.toys import AfterBlocks, rows, stack
from velora_fx.names import in_units

WORDS = 4096


class Speaking(nn.Module):
    """A small model with a large vocabulary, and its loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WORDS, 32)
        self.body = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, WORDS, bias=False)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.body(self.embed(ids)))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())
        return {"loss": loss, "logits": logits}


IDS = torch.arange(8 * 128).reshape(8, 128) % WORDS


def note_of(plan: velora_fx.Plan, start: str) -> str:
    return next((note for note in plan.notes if note.startswith(start)), "")


def held_bytes(model: nn.Module) -> int:
    """Weights, and AdamW's two moments and counter of each."""
    return sum(3 * parameter.nbytes + 4 for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_note_has_the_peak_of_a_real_loop_that_keeps_the_output(dtype: torch.dtype) -> None:
    model = Speaking().to(dtype).train()
    plan = velora_fx.plan(model, None, {"ids": IDS})
    optimizer = torch.optim.AdamW(model.parameters())
    out: Any = None

    def step() -> None:
        nonlocal out
        out = model(ids=IDS)
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    def steps() -> None:
        step()
        step()

    step()
    out = None
    real = held_bytes(model) + peak_of(steps)
    assert real > 1.01 * plan.planned.peak_bytes
    timeline = plan.planned.timeline
    assert timeline is not None
    assert timeline.peak_bytes_with_output == pytest.approx(real, rel=0.002)
    assert note_of(plan, "the model's output is taken").endswith(in_units(timeline.peak_bytes_with_output))


def test_an_output_that_makes_no_difference_is_no_note() -> None:
    assert not note_of(velora_fx.plan(stack(), None, (rows(),)), "the model's output")


def test_a_budget_that_is_met_only_without_the_output_is_said_to_be() -> None:
    peak_bytes = velora_fx.plan(Speaking(), None, {"ids": IDS}).planned.peak_bytes
    plan = velora_fx.plan(Speaking(), 1.001 * peak_bytes / 2**30, {"ids": IDS})
    assert note_of(plan, "the model's output").endswith("over the budget")


def test_a_stand_in_for_the_loss_is_said() -> None:
    class Logits(Speaking):
        def forward(self, ids: Tensor) -> Any:
            return super().forward(ids)["logits"]

    model = Logits().bfloat16()
    note = note_of(velora_fx.plan(model, None, {"ids": IDS}), "the loss is a stand-in")
    assert in_units(4 * 8 * 128 * WORDS) in note and "pass loss_fn" in note
    plan = velora_fx.plan(model, None, {"ids": IDS}, loss_fn=lambda logits: logits.float().logsumexp(-1).mean())
    assert not note_of(plan, "the loss is a stand-in")


@pytest.mark.parametrize("make", [Speaking, AfterBlocks], ids=["a loss among outputs", "a number"])
def test_a_loss_of_the_models_own_is_no_stand_in(make: Any) -> None:
    model = make()
    batch = {"ids": IDS} if make is Speaking else {"x": rows(width=64)}
    assert not note_of(velora_fx.plan(model, None, batch), "the loss is a stand-in")
