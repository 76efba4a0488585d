"""The rows of `tools/bench ops` as tables."""

from __future__ import annotations

from collections.abc import Sequence

from tools.bench.ops import OpRow
from tools.bench.results import LONGEST_CELL, markdown, milliseconds

TARGET = 1.3  # of the time of dW over its bound


def op_tables(rows: Sequence[OpRow]) -> str:
    """A table of the operators that move bytes, and one of weight gradients."""
    moving = [row for row in rows if row.operator != "dW"]
    products = [row for row in rows if row.operator == "dW"]
    parts = []
    if moving:
        parts.append(markdown(MOVING_HEADERS, [[*_head(row), *_moving_cells(row)] for row in moving]))
    if products:
        parts.append(markdown(PRODUCT_HEADERS, [[*_head(row), *_product_cells(row)] for row in products]))
    return "\n\n".join(parts)


HEAD = ("operator", "x", "O", "dtype", "M", "ms")
MOVING_HEADERS = (*HEAD, "GB/s", "of copy bandwidth", "copy of the same bytes, ms", "ATen, ms", "ATen / ours")
PRODUCT_HEADERS = (
    *HEAD, "dYᵀ z alone, ms", "dense dYᵀ x, ms", "dense / ours", "rebuilt, ms", "rebuilt / ours", "rebuilt by",
    "bound, ms", f"ours / bound (target {TARGET})", "fused, ms", "ours / fused", "fused by",
)  # fmt: skip


def _head(row: OpRow) -> list[str]:
    case = row.case
    time = row.error[:LONGEST_CELL].replace("|", "/") if row.error else milliseconds(row.ours)
    return [row.operator, f"{case.rows} x {case.width}", f"{case.out}", case.dtype, f"{case.sub_token_size}", time]


def _moving_cells(row: OpRow) -> list[str]:
    if row.ours is None or row.plain is None:
        return ["-"] * (len(MOVING_HEADERS) - len(HEAD))
    seconds = row.ours.median_seconds
    return [
        f"{row.bytes / seconds / 1e9:.1f}", f"{row.share:.0%}", milliseconds(row.copy), milliseconds(row.plain),
        f"{row.plain.median_seconds / seconds:.2f}",
    ]  # fmt: skip


def _product_cells(row: OpRow) -> list[str]:
    if row.ours is None or row.dense is None or row.rebuilt is None or row.bound_seconds is None:
        return ["-"] * (len(PRODUCT_HEADERS) - len(HEAD))
    seconds = row.ours.median_seconds
    return [
        milliseconds(row.product), milliseconds(row.dense), f"{row.dense.median_seconds / seconds:.2f}",
        milliseconds(row.rebuilt), f"{row.rebuilt.median_seconds / seconds:.2f}", row.rebuilt_by or "-",
        f"{row.bound_seconds * 1e3:.3f}", f"{row.to_bound:.2f}", milliseconds(row.fused),
        "-" if row.fused is None else f"{seconds / row.fused.median_seconds:.2f}", row.fused_by or "-",
    ]  # fmt: skip
