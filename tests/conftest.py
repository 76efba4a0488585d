"""What holds for every test process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)  # there is a process for each core


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    """What a test makes of float32 products ends with it: Trainer sets TF32, which oneDNN's have too."""
    before = torch.backends.fp32_precision
    yield
    torch.backends.fp32_precision = before
