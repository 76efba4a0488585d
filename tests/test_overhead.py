"""What a CUDA device holds besides tensors, and what that leaves of a budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from tests.helpers.examples import for_any
from velora_fx.devices import FIXED_BYTES, overhead_of, tensors_within, with_overhead
from velora_fx.peaks import FRAGMENTATION, Peak

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIB = 2**30


def test_on_cpu_there_is_no_overhead() -> None:
    assert overhead_of(CPU, GIB) == {}
    assert tensors_within(GIB, CPU) == GIB
    peak = Peak(GIB, {}, "backward")
    assert with_overhead(peak, CPU) == peak


def test_on_cuda_it_is_named_numbers_and_a_share_of_the_tensors() -> None:
    overhead = overhead_of(CUDA, 100 * GIB)
    assert list(overhead) == ["CUDA context", "cuBLAS workspaces", "allocator slack", "fragmentation"]
    assert overhead["fragmentation"] == 4 * GIB
    assert {name: size for name, size in overhead.items() if name != FRAGMENTATION} == dict(FIXED_BYTES)


def test_a_peak_of_the_device_is_that_of_the_tensors_and_the_overhead() -> None:
    peak = with_overhead(Peak(25 * GIB, {"parameters": 25 * GIB}, "backward"), CUDA)
    assert peak.tensor_bytes == 25 * GIB
    assert peak.peak_bytes == 26 * GIB + 704 * 2**20
    assert peak.breakdown == {"parameters": 25 * GIB}


@for_any(st.integers(0, 2**40), examples=200)
def test_tensors_within_a_budget_fit_it_with_their_overhead_and_one_byte_more_does_not(budget: int) -> None:
    tensors = tensors_within(budget, CUDA)
    needed = [size + sum(overhead_of(CUDA, size).values()) for size in (tensors, tensors + 1)]
    assert needed[0] <= budget < needed[1]


@pytest.mark.parametrize("budget", [0, 703 * 2**20])
def test_a_budget_below_the_fixed_part_leaves_nothing(budget: int) -> None:
    assert tensors_within(budget, CUDA) < 0
