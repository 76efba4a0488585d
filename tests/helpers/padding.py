"""Inductor's padding of matrix products on a GPU, without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch._inductor import config


@contextmanager
def padded_products() -> Iterator[None]:
    """Has every product padded whose sizes are no multiples of 16 bytes, as a GPU has where that is measured faster."""
    on_any_device: dict[str, Any] = {"check_device": lambda a, b: True, "has_triton": lambda: True}
    with mock.patch.multiple("torch._inductor.fx_passes.pad_mm", **on_any_device), config.patch(force_shape_pad=True):
        yield
