"""`tools/bench full7b`: all weights of Llama 7B trained inside a budget, by velora_fx and by plain PyTorch."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from tools.bench.results import LONGEST_CELL, markdown
from tools.bench.timing import Timing

GIB = 2**30
FITS, TOO_LARGE, OUT_OF_MEMORY = "fits", "over the budget", "out of memory"
ENDS = 3  # steps of a mean loss
LEAST_STEPS = 2 * ENDS
MOST_OFF = 0.05  # of the measured peak from the predicted one


@dataclass(frozen=True)
class FullWay:
    """How all weights are trained; `in_backward` steps each one as soon as its gradient is there, and drops that."""

    optimizer: str = "adamw"
    compiled: bool = False
    checkpointed: bool = False
    in_backward: bool = False
    factored: bool = False


@dataclass(frozen=True)
class FullCase:
    """The texts of a batch, their tokens, and the default budget."""

    batch_size: int
    length: int
    budget_gb: float


FULL_WAYS: Mapping[str, FullWay] = {
    "velora-factored-compiled": FullWay(compiled=True, factored=True),
    "adamw": FullWay(),
    "adamw-compiled-checkpointing": FullWay(compiled=True, checkpointed=True),
    # Not compiled: a compiled backward pass returns all gradients at its end, where they exist together.
    "adamw-in-backward-checkpointing": FullWay(checkpointed=True, in_backward=True),
    "sgd-in-backward-checkpointing": FullWay("sgd", checkpointed=True, in_backward=True),
}
# The first model of a device is its default. CPUs cannot limit memory: there the budget is held against the peak, and
# is, as 24 GiB are for Llama 7B, about twice the weights.
FULL_CASES: Mapping[str, Mapping[str, FullCase]] = {
    "cpu": {"llama-cpu": FullCase(1, 256, 0.2), "llama-tiny": FullCase(1, 64, 0.0015)},
    "cuda": {"llama-7b": FullCase(1, 2048, 24.0)},
}
HEADERS = (
    "model", "batch", "row", "budget, GiB", "memory", "tokens/s", "peak, GiB", "predicted, GiB", "reserved, GiB",
    "first loss", "last loss", "steps",
)  # fmt: skip


@dataclass(frozen=True)
class FullRow:
    """One way to train one model, with its figures or why there are none.

    `outcome` is "fits", "over the budget" or "out of memory" with the moment, "" before; running out of memory is an
    error of the velora row alone. `peak_bytes` is the most that tensors took after the first step, `reserved_bytes`
    (CUDA) what the allocator had for them; losses are means of a few steps at the ends.
    """

    model: str
    name: str
    way: FullWay
    device: str
    batch_size: int
    length: int
    budget_gb: float
    steps: int
    outcome: str = ""
    step: Timing | None = None
    peak_bytes: int = 0
    reserved_bytes: int | None = None
    predicted_bytes: int | None = None
    first_loss: float = 0.0
    last_loss: float = 0.0
    seconds: float = 0.0
    error: str | None = None

    def __str__(self) -> str:
        return f"{self.model}, {self.name}"

    @property
    def tokens_per_second(self) -> float:
        """Tokens of a batch over the median step."""
        return 0.0 if self.step is None else self.batch_size * self.length / self.step.median_seconds

    @property
    def dtype(self) -> torch.dtype:
        """What the model is in."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32


def full_rows(args: argparse.Namespace) -> list[FullRow]:
    """The rows that the arguments ask for."""
    rows = []
    for model in args.models:
        case = FULL_CASES[args.device][model]
        sizes = (args.batch_size or case.batch_size, args.seq_len or case.length, args.budget_gb or case.budget_gb)
        rows += [FullRow(model, name, FULL_WAYS[name], args.device, *sizes, args.steps) for name in args.rows]
    return rows


def complaints_about(row: FullRow) -> Iterator[str]:
    """What a row claims and does not hold: to fit, to have the predicted peak, and to train."""
    if row.outcome != FITS:
        yield row.outcome
    if row.step is None:
        return
    if row.predicted_bytes is not None and abs(row.peak_bytes / row.predicted_bytes - 1) > MOST_OFF:
        off = row.peak_bytes / row.predicted_bytes - 1
        yield f"the measured peak is {off:+.1%} off the predicted one, allowed {MOST_OFF:.0%}"
    if not row.last_loss < row.first_loss:  # so that NaN is wrong too
        yield f"the loss did not fall: {row.first_loss:.4f} at first, {row.last_loss:.4f} at last"


def full_table(rows: Sequence[FullRow]) -> str:
    """A line for each row."""
    return markdown(HEADERS, [_cells(row) for row in rows])


def _cells(row: FullRow) -> list[str]:
    head = [row.model, f"{row.batch_size} x {row.length}", row.name, f"{row.budget_gb:g}"]
    if row.step is None:
        why = row.outcome or (row.error or "not measured").replace("|", "/")[:LONGEST_CELL]
        return [*head, why, *["-"] * (len(HEADERS) - len(head) - 2), f"{row.steps}"]
    return [
        *head,
        row.outcome if row.error is None else f"{row.outcome}, failed",
        f"{row.tokens_per_second:,.0f}",
        f"{row.peak_bytes / GIB:.4g}",
        "-" if row.predicted_bytes is None else f"{row.predicted_bytes / GIB:.4g}",
        "-" if row.reserved_bytes is None else f"{row.reserved_bytes / GIB:.4g}",
        f"{row.first_loss:.4f}",
        f"{row.last_loss:.4f}",
        f"{row.steps}",
    ]
