"""Bytes as text."""

from __future__ import annotations

UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def in_units(size: int) -> str:
    """A number of bytes in the largest binary unit that it fills: "1.50 GiB"."""
    return next((f"{size / unit:.2f} {name}" for unit, name in UNITS if size >= unit), f"{size} B")
