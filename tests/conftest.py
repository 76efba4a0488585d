"""What holds for every test process."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

torch.set_num_threads(1)  # there is a process for each core


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    """What a test makes of float32 products ends with it: Trainer sets TF32, which oneDNN's have too."""
    before = torch.backends.fp32_precision
    yield
    torch.backends.fp32_precision = before


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Calls a function in a process in which Triton's kernels run on the CPU, and returns its result.

    Triton reads TRITON_INTERPRET when it is imported.
    """
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_poison_new_tensors)
        pool.submit(int).result()
    with pool:
        yield lambda function, *args: pool.submit(function, *args).result()


def _poison_new_tensors() -> None:
    """What a kernel leaves unwritten is NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(1)
    assert torch.empty(3).isnan().all() and torch.ones(1).new_empty(3).isnan().all()
