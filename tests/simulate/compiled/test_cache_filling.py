"""Blocks that leave keys and values in a cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.helpers.graph_text import operations
from velora_fx.capture import state_of, tensors_inside
from velora_fx.simulate.compiled.cache_filling import filling_graph


class Cache:
    """As Hugging Face caches are: filled by `update`, empty at first, with a tensor of its own."""

    def __init__(self) -> None:
        self.offset = torch.zeros(())
        self.layers: list[Tensor] = []

    def update(self, keys: Tensor) -> Tensor:
        self.layers.append(keys + self.offset)
        return self.layers[-1]

    def get_seq_length(self, layer: int = 0) -> int:
        return len(self.layers)


class Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.keys = nn.Linear(8, 4)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        keys = self.keys(x)
        return keys.relu() if cache is None else cache.update(keys).relu()


def test_the_graph_returns_what_the_block_returns_and_then_what_the_cache_holds() -> None:
    block, cache, x = Caching(), Cache(), torch.randn(3, 8)
    gm = filling_graph(block, (x,), {"cache": cache}, [cache])
    result, offset, keys = gm(*state_of(block).values(), x)
    torch.testing.assert_close(keys, block.keys(x))
    torch.testing.assert_close(result, keys.relu())
    assert offset.shape == ()
    assert operations(gm)["linear"] == 1


def test_the_cache_that_is_given_stays_empty_and_the_block_as_it_is() -> None:
    block, cache, x = Caching(), Cache(), torch.randn(3, 8)
    before = dict(vars(block))
    filling_graph(block, (x,), {"cache": cache}, [cache])
    assert not cache.layers and dict(vars(block)) == before


def test_the_tensors_of_a_cache_are_the_floating_ones_in_its_attributes_and_lists() -> None:
    cache = Cache()
    cache.layers = [torch.ones(2), torch.ones(0), torch.ones(2, dtype=torch.long)]
    assert [tuple(tensor.shape) for tensor in tensors_inside(cache)] == [(), (2,)]
