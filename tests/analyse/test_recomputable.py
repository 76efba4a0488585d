"""Which blocks may run twice, and what they keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from tests.end_to_end.test_memory import batch_of, llama
from tests.helpers.toys import Stack, rows, stack
from velora_fx.analyse import Analysis, analyse
from velora_fx.options import Options


def analysis_of(model: nn.Module, *args: Tensor, **kwargs: Tensor) -> Analysis:
    return analyse(model, args, kwargs, Options(optimizer="sgd"), torch.device("cpu"), lambda step: None)


def test_blocks_are_found_in_order_and_equal_ones_keep_equally_much() -> None:
    model = llama().train()
    blocks = analysis_of(model, **batch_of(model)).blocks
    assert [block.name for block in blocks] == [f"model.layers.{number}" for number in range(3)]
    # The first block's input is kept by itself alone, the others' by the block before too.
    assert len({block.kept_bytes for block in blocks[1:]}) == 1
    assert [block.first for block in blocks] == sorted(block.first for block in blocks)
    assert [block.end for block in blocks] == sorted((block.end for block in blocks), reverse=True)


class Masking(Stack):
    """Makes a mask that all of its blocks keep."""

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        return super().forward(x, x.detach().sigmoid())


def test_what_all_blocks_keep_counts_for_none() -> None:
    model, making = stack(), Masking().train()
    made = analysis_of(making, rows(64, 64)).blocks
    assert [block.kept_bytes for block in made] == [b.kept_bytes for b in analysis_of(model, rows(64, 64)).blocks]
    mask = torch.ones(64, 64, 32)
    alone = analysis_of(model, rows(64, 64)).blocks
    masked = analysis_of(model, rows(64, 64), mask).blocks
    assert [block.kept_bytes for block in masked] == [block.kept_bytes for block in alone]
    assert all(block.first < block.end for block in masked)


def test_a_block_whose_weights_are_normalised_by_an_iteration_that_it_goes_on_with_does_not_run_twice() -> None:
    """Spectral normalisation writes its vectors by `out=`; weight normalisation keeps none."""
    found = {}
    for normalise in (spectral_norm, weight_norm):
        model = stack()
        for block in model.blocks:
            normalise(block.up)
        found[normalise] = [block.name for block in analysis_of(model, rows(64, 64)).blocks]
    assert found[spectral_norm] == [] and len(found[weight_norm]) == len(stack().blocks)


@pytest.mark.slow
def test_blocks_that_are_checkpointed_already_or_cannot_be_captured_are_left_out() -> None:
    model = llama().train()
    model.gradient_checkpointing_enable()
    assert analysis_of(model, **batch_of(model)).blocks == ()

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(32, 32), nn.ReLU())

        def forward(self, x: Tensor, mask: Tensor | None = None, cache: None = None) -> Tensor:
            x.register_hook(lambda gradient: None)  # which a graph would not do
            result: Tensor = self.inner(x)
            return result

    mixed = stack()
    mixed.blocks[1] = Branching()
    assert [block.name for block in analysis_of(mixed, rows(64, 64)).blocks] == ["blocks.0", "blocks.2"]
