"""The ways to train a model in full and by adapters; the rows to measure, and their table."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from tools.bench.results import LONGEST_CELL, markdown, time_cell
from tools.bench.train import TrainRow, Way

GIB = 2**30
EXACT = {"ban_recompute_materialized_backward": False}
# The most telling ways and models first: in this order they are measured.
STEP_WAYS: Mapping[str, Way] = {
    "compile": Way(compiled=True),
    "velora-compiled-all": Way(compiled=True, compresses="all"),
    "compile-exact": Way(compiled=True, settings=EXACT, is_planned=False),
    "velora-compiled-all-exact": Way(compiled=True, compresses="all", settings=EXACT),
    "eager": Way(),
    "velora-eager-all": Way(compresses="all"),
    "velora-eager-v+down": Way(compresses="v+down"),
    "compile-budget-0.5": Way(compiled=True, settings={"activation_memory_budget": 0.5}, is_planned=False),
    "checkpointing": Way(checkpointed=True, is_planned=False),
    # Not with LoRA: for checkpointing the embeddings' output is told to want a gradient, by requires_grad_() in a hook,
    # and with fullgraph Dynamo refuses to return a tensor that comes from one.
    "compile+checkpointing": Way(compiled=True, checkpointed=True, is_planned=False),
}
# Texts or images of a batch and tokens of a text: on CUDA as many as an untouched eager step fits into 80 GB.
STEP_CASES: Mapping[str, Mapping[str, tuple[int, int | None]]] = {
    "cpu": {"llama-cpu": (2, 512)},
    "cuda": {
        "llama-1b": (8, 2048), "vit-b-16": (128, None), "llama-350m": (16, 1024), "llama-130m": (32, 1024),
    },
}  # fmt: skip
LORA_WAYS: Mapping[str, Way] = {
    "lora-compiled": Way(adapter="lora", compiled=True),
    "velora-compiled": Way(adapter="lora", compiled=True, compresses="all"),
    "lora": Way(adapter="lora"),
    "velora-eager": Way(adapter="lora", compresses="all"),
    "peft-velora": Way(adapter="peft-velora", is_planned=False),
    "lora+checkpointing": Way(adapter="lora", checkpointed=True, is_planned=False),
}
LORA_CASES: Mapping[str, Mapping[str, tuple[int, int | None]]] = {
    "cpu": {"llama-cpu": (2, 512)},
    "cuda": {"llama-1b": (8, 2048), "llama-350m": (16, 1024), "llama-130m": (32, 1024)},
}
# The name of the benchmark, its ways, its models by device, and the row that speed is told over.
TRAINED = {"step": (STEP_WAYS, STEP_CASES, "compile"), "lora": (LORA_WAYS, LORA_CASES, "lora-compiled")}
SUB_TOKEN_SIZE = 32
REPEATS = {True: 3, False: 10}  # by whether it is quick
HEADERS = (
    "model", "batch", "row", "step, ms", "tokens/s", "over compile", "bound", "peak, GiB", "predicted, GiB",
    "saved, GiB", "compressed", "dW error", "error of exact gradients", "planning + compiling + steps, s",
)  # fmt: skip


def training_rows(args: argparse.Namespace) -> list[TrainRow]:
    """The rows that the arguments ask for: every way for every model."""
    ways, cases, _ = TRAINED[args.benchmark]
    rows = []
    for model in args.models:
        batch_size, length = cases[args.device][model]
        sizes = (args.batch_size or batch_size, length and (args.seq_len or length), args.sub_token_size)
        repeats = args.repeats or REPEATS[args.quick]
        rows += [TrainRow(model, name, ways[name], args.device, *sizes, repeats) for name in args.rows]
    return rows


def train_table(rows: Sequence[TrainRow], over: str) -> str:
    """A line for each row, its speed over that of the compiled row of the same model with the name `over`, and the
    bound of that: what it would be if all products of compressed weights' gradients took no time."""
    base = {row.model: row for row in rows if row.name == over and row.error is None}
    headers = [header.replace("compile", over) if header == "over compile" else header for header in HEADERS]
    return markdown(headers, [_cells(row, base.get(row.model)) for row in rows])


def _cells(row: TrainRow, base: TrainRow | None) -> list[str]:
    batch = f"{row.batch_size}" if row.length is None else f"{row.batch_size} x {row.length}"
    head = [row.model, batch, row.name]
    if row.error is not None or row.step is None:
        reason = (row.error or "not measured").replace("|", "/")[:LONGEST_CELL]
        return [*head, reason, *["-"] * (len(HEADERS) - len(head) - 2), time_cell(row)]
    return [
        *head,
        f"{row.step.median_seconds * 1e3:.1f} ±{row.step.spread_seconds * 1e3:.1f}",
        f"{row.tokens_per_second:,.0f}",
        "-" if base is None else f"{row.tokens_per_second / base.tokens_per_second:.3f}",
        _bound(row, base),
        f"{row.peak_bytes / GIB:.3f}",
        "-" if row.predicted_bytes is None else f"{row.predicted_bytes / GIB:.3f}",
        f"{row.saved_bytes / GIB:.3f}",
        f"{row.num_compressed}" + (f" of {row.num_linears}" if row.num_compressed else ""),
        "-" if row.compressed_error is None else f"{row.compressed_error:.3f}",
        f"{row.exact_error:.1e}",
        time_cell(row),
    ]


def _bound(row: TrainRow, base: TrainRow | None) -> str:
    if base is None or base.step is None or row.products_seconds is None or not row.way.compiled:
        return "-"
    dense_seconds = base.step.median_seconds
    return f"{dense_seconds / max(1e-9, dense_seconds - row.products_seconds):.3f}"
