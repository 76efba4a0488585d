"""Which part of a weight, its carrier and its projection a rank holds."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.end_to_end.test_distributed import on_two_ranks
from velora_fx.runtime.shards import local_shard


def test_plain_tensors_are_taken_whole_and_transposed_weights_turned():
    weight, carrier, v = torch.randn(6, 4), torch.randn(3, 4), torch.randn(3, 2)
    shard = local_shard(weight, carrier, v, input_dim=0)
    assert shard.weight.data_ptr() == weight.data_ptr() and shard.weight.shape == (4, 6)
    assert shard.carrier.shape == (4, 3) and shard.v is v


def sharded(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    weight, carrier, v = torch.arange(48.0).view(12, 4), torch.arange(16.0).view(4, 4), torch.randn(4, 3)
    parts = [distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in (weight, carrier)]
    shard = local_shard(parts[0], parts[1], v, input_dim=0)
    assert torch.equal(shard.weight, weight[6 * rank : 6 * rank + 6].t())
    assert torch.equal(shard.carrier, carrier[2 * rank : 2 * rank + 2].t())
    assert torch.equal(shard.v, v[2 * rank : 2 * rank + 2])
    torn = [distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in (torch.zeros(6, 4), torch.zeros(3, 4))]
    with pytest.raises(RuntimeError, match=r"within its sub-tokens of 2: shard over a number of ranks that divides 3"):
        local_shard(torn[0], torn[1], torch.randn(3, 2), input_dim=0)


def test_of_sharded_tensors_the_local_parts_go_together_and_torn_sub_tokens_are_refused():
    on_two_ranks(sharded)
