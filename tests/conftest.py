"""What holds for every test process."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

torch.set_num_threads(1)  # there is a process for each core
TOOLS = Path(__file__).resolve().parents[1] / "tools"
BENCH = (
    "bench", "bench_figures", "bench_full7b", "bench_full7b_train", "bench_models", "bench_numerics", "bench_ops",
    "bench_results", "bench_timing", "bench_train",
)  # fmt: skip


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    """What a test makes of float32 products ends with it: Trainer sets TF32, which oneDNN's have too."""
    before = torch.backends.fp32_precision
    yield
    torch.backends.fp32_precision = before


@pytest.fixture(scope="session")
def tools() -> Iterator[Any]:
    """The modules of tools/bench.py by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in BENCH})
