"""Tied weights that may be approximate have one gradient, the sum of those of all their uses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import velora_fx
from tests.helpers.gradients import assert_same_gradients, compressed_weights, rebuilt_inputs, step, tightest

WIDTH, WORDS = 32, 64


class Tied(nn.Module):
    """Linears tied in each block, across blocks, and a head tied to the embedding, as told."""

    def __init__(self, inside: bool = False, across: bool = False, head: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
            for _ in range(2)
        )
        self.norm, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        for block in self.blocks:
            if inside:
                block[3].weight = block[1].weight
            if across:
                block[1].weight = self.blocks[0][1].weight
        if head:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        logits = self.lm_head(self.norm(x))
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())


TIES: tuple[dict[str, bool], ...] = (
    {"head": True},
    {"inside": True},
    {"across": True},
    {"inside": True, "across": True},
)


def made(**ties: bool) -> tuple[Tied, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Tied(**ties).train(), {"ids": torch.randint(WORDS, (8, 16))}


def everything(module: nn.Module, name: str) -> bool:
    return True


def compressed(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> velora_fx.Plan:
    plan = tightest(model, batch, filter_fn=everything, **options)
    velora_fx.apply(model, plan, batch)
    return plan


@pytest.mark.parametrize("ties", TIES)
def test_a_tied_weight_has_the_gradient_of_the_papers_rebuilt_inputs(ties: dict[str, bool]) -> None:
    model, batch = made(**ties)
    reference = copy.deepcopy(model)
    plan = compressed(model, batch)
    assert len(plan.compressed) >= 3
    projections = compressed_weights(model)
    step(model, batch, lambda loss: loss)
    approximate = {name for name, _ in model.named_parameters()} & set(projections)
    exact = copy.deepcopy(reference)
    step(exact, batch, lambda loss: loss)
    names = {name for name, _ in model.named_parameters()}
    tied = {
        n
        for n, p in reference.named_parameters()
        if sum(q is p for _, q in reference.named_parameters(remove_duplicate=False)) > 1
    }
    assert_same_gradients(model, exact, names - approximate - tied)
    if ties == {"head": True}:  # all other uses of a tied weight have projections of their own
        with rebuilt_inputs(reference, projections):
            step(reference, batch, lambda loss: loss)
        assert_same_gradients(model, reference)


@pytest.mark.parametrize("ties", TIES)
def test_every_product_of_a_tied_weight_is_decided_once(ties: dict[str, bool]) -> None:
    model, batch = made(**ties)
    plan = compressed(model, batch)
    consumers = [name for decision in plan.compressed for name in decision.consumers]
    assert len(consumers) == len(set(consumers))
    assert {name.partition("#")[0] for name in consumers} >= {"blocks.0.1", "lm_head"}


@pytest.mark.parametrize("ties", TIES)
def test_factored_gradients_leave_tied_weights_dense_and_say_so(ties: dict[str, bool]) -> None:
    model, batch = made(**ties)
    exact = copy.deepcopy(model)
    plan = compressed(model, batch, gradients="factored")
    assert any("shared with" in s.reason or "several products" in s.reason for s in plan.skipped)
    step(model, batch, lambda loss: loss)
    step(exact, batch, lambda loss: loss)
    tied = {id(p) for p in model.parameters()}
    names = {n for n, p in model.named_parameters() if p.requires_grad and not n.endswith("_carrier") and id(p) in tied}
    assert_same_gradients(model, exact, names)


@pytest.mark.slow
def test_a_head_tied_to_an_embedding_can_be_compressed_where_the_step_is_compiled() -> None:
    model, batch = made(head=True)
    plan = tightest(model, batch, filter_fn=everything, compiled=True)
    assert "lm_head" in {name for decision in plan.compressed for name in decision.consumers}
