"""`tools/bench full7b`: all weights of Llama 7B trained inside a budget, beside what else trains it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from tools.bench.results import LONGEST_CELL, markdown, time_cell
from tools.bench.timing import Timing

GIB = 2**30
FITS, TOO_LARGE, OUT_OF_MEMORY = "fits", "over the budget", "out of memory"
ENDS = 0.2  # of all steps, whose loss is averaged at the start and at the end
LEAST_STEPS = 6
MOST_OFF = 0.05  # of the measured peak from the predicted one
OVER = "adamw-whole-card"  # the speed to beat


@dataclass(frozen=True)
class FullWay:
    """How a model is trained: all weights, or with `is_lora` adapters alone.

    Each way is trained at every one of its `rates` and counts at the best. `in_backward` steps each weight as soon as
    its gradient is there, and drops that. `sub_token_size` is that of velora_fx's factored gradients, None without
    them; it recomputes with `recomputes`. `is_planned` says whether velora_fx predicts a peak. `on_whole_card` has all
    memory of the device, and velora_fx then compresses for speed.
    """

    optimizer: str = "adamw"
    rates: tuple[float, ...] = (1e-4, 3e-4)
    compiled: bool = True
    checkpointed: bool = False
    in_backward: bool = False
    is_lora: bool = False
    sub_token_size: int | None = None
    recomputes: bool = True
    is_planned: bool = True
    on_whole_card: bool = False


@dataclass(frozen=True)
class FullCase:
    """The texts of a batch, their tokens, and the default budget."""

    batch_size: int
    length: int
    budget_gb: float


# The most telling first: in this order they are measured. Steps in the backward pass are not compiled: a compiled one
# returns all gradients at its end, where they exist together.
FULL_WAYS: Mapping[str, FullWay] = {
    "velora-8": FullWay(sub_token_size=8),
    OVER: FullWay(on_whole_card=True),
    "velora-16": FullWay(sub_token_size=16),
    "lora": FullWay(is_lora=True, rates=(3e-4, 1e-3)),
    "adamw-8bit-in-backward-checkpointing": FullWay(
        "adamw-8bit", compiled=False, checkpointed=True, in_backward=True, is_planned=False
    ),
    "velora-8-whole-card": FullWay(sub_token_size=8, on_whole_card=True),
    "adamw-checkpointing-whole-card": FullWay(checkpointed=True, on_whole_card=True, is_planned=False),
    "velora-16-no-recompute": FullWay(sub_token_size=16, recomputes=False),
    "adamw-in-backward-checkpointing": FullWay(
        compiled=False, checkpointed=True, in_backward=True, is_planned=False
    ),
    "sgd-in-backward-checkpointing": FullWay(
        "sgd", (0.01, 0.03), compiled=False, checkpointed=True, in_backward=True, is_planned=False
    ),
}  # fmt: skip
# The first model of a device is its default. CPUs cannot limit memory: there the budget is held against the peak, and
# is, as 24 GiB are for Llama 7B, about twice the weights.
FULL_CASES: Mapping[str, Mapping[str, FullCase]] = {
    "cpu": {"llama-cpu": FullCase(1, 256, 0.2), "llama-tiny": FullCase(1, 64, 0.0024)},
    "cuda": {"llama-7b": FullCase(1, 2048, 24.0), "llama-3-8b": FullCase(1, 2048, 24.0)},
}
HEADERS = (
    "model", "batch", "row", "budget, GiB", "memory", "tokens/s", f"over {OVER}", "peak, GiB", "predicted, GiB",
    "reserved, GiB", "rate", "first loss", "last loss", "steps", "planning + compiling + steps, s",
)  # fmt: skip


@dataclass(frozen=True)
class FullRow:
    """One way to train one model, with its figures or why there are none.

    `budget_gb` is None for all memory of the device. `outcome` is "fits", "over the budget" or "out of memory" with the
    moment, "" before; running out of memory is an error of a velora row alone. `peak_bytes` is the most that tensors
    took after the first step, `reserved_bytes` (CUDA) what the allocator had for them. Losses are means over the first
    and the last fifth of the steps; `last_losses` has the last one at each rate of the way, `rate` is the best of
    those. Seconds are told apart as in `TrainRow`.
    """

    model: str
    name: str
    way: FullWay
    device: str
    batch_size: int
    length: int
    budget_gb: float | None
    steps: int
    outcome: str = ""
    step: Timing | None = None
    peak_bytes: int = 0
    reserved_bytes: int | None = None
    predicted_bytes: int | None = None
    rate: float = 0.0
    first_loss: float = 0.0
    last_loss: float = 0.0
    last_losses: tuple[float, ...] = ()
    has_plan_file: bool = False
    planning_seconds: float = 0.0
    compiling_seconds: float = 0.0
    steps_seconds: float = 0.0
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

    @property
    def plan_name(self) -> str:
        """The name of the file of its plan, "" without a plan."""
        if not self.way.is_planned:
            return ""
        budget = "" if self.budget_gb is None else f"-{self.budget_gb:g}GiB"
        return f"{self.device}-{self.model}-{self.batch_size}x{self.length}-{self.name}{budget}"


def full_rows(args: argparse.Namespace) -> list[FullRow]:
    """The rows that the arguments ask for."""
    rows = []
    for model in args.models:
        case = FULL_CASES[args.device][model]
        batch_size, length = args.batch_size or case.batch_size, args.seq_len or case.length
        for name in args.rows:
            budget_gb = None if FULL_WAYS[name].on_whole_card else args.budget_gb or case.budget_gb
            rows.append(FullRow(model, name, FULL_WAYS[name], args.device, batch_size, length, budget_gb, args.steps))
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
    """A line for each row, its speed over that of dense AdamW on the whole card."""
    base = {row.model: row.tokens_per_second for row in rows if row.name == OVER and row.step is not None}
    return markdown(HEADERS, [_cells(row, base.get(row.model)) for row in rows])


def _cells(row: FullRow, base: float | None) -> list[str]:
    budget = "whole card" if row.budget_gb is None else f"{row.budget_gb:g}"
    head = [row.model, f"{row.batch_size} x {row.length}", row.name, budget]
    if row.step is None:
        why = row.outcome or (row.error or "not measured").replace("|", "/")[:LONGEST_CELL]
        return [*head, why, *["-"] * (len(HEADERS) - len(head) - 3), f"{row.steps}", time_cell(row)]
    return [
        *head,
        row.outcome if row.error is None else f"{row.outcome}, failed",
        f"{row.tokens_per_second:,.0f}",
        "-" if base is None else f"{row.tokens_per_second / base:.3f}",
        f"{row.peak_bytes / GIB:.4g}",
        "-" if row.predicted_bytes is None else f"{row.predicted_bytes / GIB:.4g}",
        "-" if row.reserved_bytes is None else f"{row.reserved_bytes / GIB:.4g}",
        f"{row.rate:g}",
        f"{row.first_loss:.4f}",
        f"{row.last_loss:.4f}",
        f"{row.steps}",
        time_cell(row),
    ]
