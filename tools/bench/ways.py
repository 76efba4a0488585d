"""The ways to train a model in full and by adapters; and the table of training rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tools.bench.results import LONGEST_CELL, markdown
from tools.bench.train import TrainRow, Way

GIB = 2**30
EXACT = {"ban_recompute_materialized_backward": False}
STEP_WAYS: Mapping[str, Way] = {
    "eager": Way(),
    "compile": Way(compiled=True),
    "compile-exact": Way(compiled=True, settings=EXACT, is_planned=False),
    "compile-budget-0.5": Way(compiled=True, settings={"activation_memory_budget": 0.5}, is_planned=False),
    "checkpointing": Way(checkpointed=True, is_planned=False),
    # Not with LoRA: for checkpointing the embeddings' output is told to want a gradient, by requires_grad_() in a hook,
    # and with fullgraph Dynamo refuses to return a tensor that comes from one.
    "compile+checkpointing": Way(compiled=True, checkpointed=True, is_planned=False),
    "velora-eager-v+down": Way(compresses="v+down"),
    "velora-eager-all": Way(compresses="all"),
    "velora-compiled-v+down": Way(compiled=True, compresses="v+down"),
    "velora-compiled-all": Way(compiled=True, compresses="all"),
    "velora-compiled-all-exact": Way(compiled=True, compresses="all", settings=EXACT),
}
# Texts or images of a batch and tokens of a text: on CUDA as many as an untouched eager step fits into 80 GB.
STEP_CASES: Mapping[str, Mapping[str, tuple[int, int | None]]] = {
    "cpu": {"llama-cpu": (2, 512)},
    "cuda": {
        "llama-130m": (32, 1024), "llama-350m": (16, 1024), "llama-1b": (8, 2048), "vit-b-16": (128, None),
    },
}  # fmt: skip
LORA_WAYS: Mapping[str, Way] = {
    "lora": Way(adapter="lora"),
    "lora+checkpointing": Way(adapter="lora", checkpointed=True, is_planned=False),
    "lora-compiled": Way(adapter="lora", compiled=True),
    "peft-velora": Way(adapter="peft-velora", is_planned=False),
    "velora-eager": Way(adapter="lora", compresses="all"),
    "velora-compiled": Way(adapter="lora", compiled=True, compresses="all"),
}
LORA_CASES: Mapping[str, Mapping[str, tuple[int, int | None]]] = {
    "cpu": {"llama-cpu": (2, 512)},
    "cuda": {"llama-130m": (32, 1024), "llama-350m": (16, 1024), "llama-1b": (8, 2048)},
}
HEADERS = (
    "model", "batch", "row", "step, ms", "tokens/s", "over compile", "peak, GiB", "predicted, GiB", "saved, GiB",
    "compressed", "dW error", "error of exact gradients",
)  # fmt: skip


def train_table(rows: Sequence[TrainRow], over: str) -> str:
    """A line for each row, its speed over that of the row of the same model with the name `over`."""
    base = {row.model: row.tokens_per_second for row in rows if row.name == over and row.error is None}
    headers = [header.replace("compile", over) if header == "over compile" else header for header in HEADERS]
    return markdown(headers, [_cells(row, base.get(row.model)) for row in rows])


def _cells(row: TrainRow, base: float | None) -> list[str]:
    batch = f"{row.batch_size}" if row.length is None else f"{row.batch_size} x {row.length}"
    head = [row.model, batch, row.name]
    if row.error is not None or row.step is None:
        reason = (row.error or "not measured").replace("|", "/")[:LONGEST_CELL]
        return [*head, reason, *["-"] * (len(HEADERS) - len(head) - 1)]
    return [
        *head,
        f"{row.step.median_seconds * 1e3:.1f} ±{row.step.spread_seconds * 1e3:.1f}",
        f"{row.tokens_per_second:,.0f}",
        "-" if base is None else f"{row.tokens_per_second / base:.3f}",
        f"{row.peak_bytes / GIB:.3f}",
        "-" if row.predicted_bytes is None else f"{row.predicted_bytes / GIB:.3f}",
        f"{row.saved_bytes / GIB:.3f}",
        f"{row.num_compressed}",
        "-" if row.compressed_error is None else f"{row.compressed_error:.3f}",
        f"{row.exact_error:.1e}",
    ]
