"""Bytes as text."""

from __future__ import annotations

import pytest

from velora_fx.names import in_units

GIB, MIB = 2**30, 2**20


@pytest.mark.parametrize(
    ("size", "expected"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (MIB, "1.00 MiB"), (GIB * 3 // 2, "1.50 GiB")],
)
def test_bytes_are_shown_in_binary_units(size: int, expected: str) -> None:
    assert in_units(size) == expected
