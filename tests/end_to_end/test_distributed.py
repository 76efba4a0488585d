"""Two ranks over gloo on one machine."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import velora_fx
from tests.helpers.gradients import compressed_weights, rebuilt_inputs, regions_of, tightest
from tests.helpers.toys import stack, without_dropout


def on_two_ranks(work: Callable[[int], None]) -> None:
    """Runs `work(rank)` in two processes with a gloo group between them; an assertion that fails there fails here."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (str(Path(folder) / "store"), work), nprocs=2)  # type: ignore[no-untyped-call]


def _rank(rank: int, store: str, work: Callable[[int], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        work(rank)
    finally:
        dist.destroy_process_group()


def joined_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of one process on both ranks' batches."""
    reference = without_dropout(stack())
    with rebuilt_inputs(reference, compressed_weights(model)):
        (reference(batch(0)) + reference(batch(1))).div(2).backward()
    return {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}


def batch(rank: int) -> torch.Tensor:
    return torch.randn(4, 8, 32, generator=torch.Generator().manual_seed(rank))


def ddp(rank: int) -> None:
    model = without_dropout(stack())
    velora_fx.apply(model, tightest(model, (batch(rank),)), (batch(rank),))
    wrapped = DistributedDataParallel(model)
    wrapped(batch(rank)).backward()
    assert velora_fx.plan_of(wrapped).compressed
    for name, expected in joined_gradients(model).items():
        torch.testing.assert_close(model.get_parameter(name).grad, expected, rtol=1e-4, atol=1e-6)


def fsdp2(rank: int) -> None:
    model = without_dropout(stack())
    velora_fx.apply(model, tightest(model, (batch(rank),)), (batch(rank),))
    expected = joined_gradients(model)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    model(batch(rank)).backward()
    assert len(regions_of(model)) == 4
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), expected[name], rtol=1e-4, atol=1e-6)


def batch_mean(rank: int) -> None:
    model = without_dropout(stack())
    plan = tightest(model, (batch(rank),), projection="batch_mean")
    velora_fx.apply(model, plan, (batch(rank),))
    mine = torch.cat([v.flatten() for region in regions_of(model) for v in region.projections.values()])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    assert torch.equal(*both)
    v = compressed_weights(model)["blocks.0.up.weight"].double()
    sub_tokens = nn.functional.layer_norm(batch(0), (32,)).double().reshape(-1, v.shape[1])
    mean = sub_tokens.mean(0)
    torch.testing.assert_close(v, (mean / mean.norm()).expand_as(v), rtol=1e-5, atol=1e-5)


def test_ddp_averages_the_gradients_of_both_ranks() -> None:
    on_two_ranks(ddp)


def measured_under_ddp(rank: int) -> None:
    model = without_dropout(stack())
    velora_fx.optimize(model, 1, (batch(rank),))
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters())
    for number in range(2):
        with velora_fx.measure(wrapped) if number else contextlib.nullcontext():
            wrapped(batch(rank)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert velora_fx.plan_of(wrapped).measured is not None


def factored_and_joined() -> tuple[nn.Module, nn.Module]:
    """A model with factored gradients in float64, and one with dense ones of the same projections."""
    model = without_dropout(stack()).double()
    plan = tightest(model, (batch(0).double(),), gradients="factored")
    made = [
        velora_fx.apply(copy.deepcopy(model), each, (batch(0).double(),))
        for each in (plan, replace(plan, gradients="dense"))
    ]
    return made[0], made[1]


def assert_trained_like(model: nn.Module, reference: nn.Module, steps: Callable[[int], None]) -> None:
    """The weights equal those of one process on both batches."""
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    for number in range(5):
        steps(number)
        joined = [reference(batch(rank).double() + number) for rank in range(2)]
        (sum(joined) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        own = value.full_tensor() if hasattr(value, "full_tensor") else value
        expected = reference.state_dict()[name]
        assert (own - expected).norm() <= 1e-9 * expected.norm(), name


def ddp_factored(rank: int) -> None:
    model, reference = factored_and_joined()
    wrapped = DistributedDataParallel(model)
    sent: list[int] = []

    def counted(state, bucket):  # type: ignore[no-untyped-def]  # DDP looks at annotations
        sent.append(bucket.buffer().nbytes)
        return allreduce_hook(dist.group.WORLD, bucket)

    wrapped.register_comm_hook(None, counted)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)

    def step(number: int) -> None:
        optimizer.zero_grad()
        wrapped(batch(rank).double() + number).backward()
        optimizer.step()

    assert_trained_like(model, reference, step)
    sizes = {name: v.shape[1] for name, v in compressed_weights(model).items()}
    dense = [(name, p.nbytes) for name, p in reference.named_parameters()]
    expected = sum(num_bytes / sizes.get(name, 1) for name, num_bytes in dense)
    assert sizes and abs(sum(sent) / 5 - expected) <= 0.02 * expected < 0.1 * sum(num_bytes for _, num_bytes in dense)


def fsdp2_factored(rank: int) -> None:
    model, reference = factored_and_joined()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(number: int) -> None:
        optimizer.zero_grad()
        model(batch(rank).double() + number).backward()
        optimizer.step()

    assert_trained_like(model, reference, step)


@pytest.mark.slow
def test_ddp_reduces_factored_gradients_which_are_m_times_smaller() -> None:
    on_two_ranks(ddp_factored)


def test_fsdp2_steps_the_shards_of_weights_with_factored_gradients() -> None:
    on_two_ranks(fsdp2_factored)


@pytest.mark.slow
def test_a_step_under_ddp_is_measured_on_each_rank() -> None:
    on_two_ranks(measured_under_ddp)


@pytest.mark.slow
def test_fsdp2_shards_the_gradients_of_both_ranks() -> None:
    on_two_ranks(fsdp2)


def test_all_ranks_take_the_projections_of_rank_zeros_batch() -> None:
    on_two_ranks(batch_mean)
