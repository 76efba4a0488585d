"""`bench.py lora`: the ways to train PEFT's LoRA adapters."""

from __future__ import annotations

from collections.abc import Mapping

from bench_train import Way

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
