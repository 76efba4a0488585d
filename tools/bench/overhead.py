"""What a compressed block costs in Python: eager calls of it over calls of the dense one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import velora_fx
from tools.bench.models import llama_of_shape
from tools.bench.timing import Timing, timed_in_turn

PLANNED_TOKENS, SUB_TOKEN = 512, 8


@dataclass(frozen=True)
class OverheadRow:
    """Times of a forward, and of a whole step with AdamW, of a model with every linear compressed and of the dense one.

    `blocks` is how many blocks a call goes through. `error` is why there is no figure.
    """

    model: str
    tokens: int
    device: str
    repeats: int
    blocks: int = 0
    forward: Timing | None = None
    dense_forward: Timing | None = None
    step: Timing | None = None
    dense_step: Timing | None = None
    error: str | None = None


class Block(nn.Module):
    """Linear, GELU, linear, with a norm and a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))  # type: ignore[no-any-return]


class Toy(nn.Module):
    """Eight blocks, 64 wide, and the mean square of what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(64) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def _toy(tokens: int) -> tuple[nn.Module, dict[str, Tensor]]:
    return Toy(), {"x": torch.randn(1, tokens, 64)}


def _llama(tokens: int) -> tuple[nn.Module, dict[str, Tensor]]:
    return llama_of_shape(64, 8, 256, 4, 4, 96, (1, tokens), "cpu")


MODELS: dict[str, Callable[[int], tuple[nn.Module, dict[str, Tensor]]]] = {"toy": _toy, "llama": _llama}


def overhead_rows(names: Sequence[str], device: str, repeats: int) -> list[OverheadRow]:
    """The rows of these models, at 16 and at 2048 tokens."""
    return [OverheadRow(name, tokens, device, repeats) for name in names for tokens in (16, 2048)]


def measure_overhead(row: OverheadRow) -> OverheadRow:
    """Times both models in turn."""
    try:
        torch.manual_seed(0)
        dense = MODELS[row.model](row.tokens)[0].to(row.device).train()
        plan = _all_compressed(dense, _on(MODELS[row.model](PLANNED_TOKENS)[1], row.device))
        ours = velora_fx.apply(copy.deepcopy(dense), plan)
        batch = _on(MODELS[row.model](row.tokens)[1], row.device)
        if len(plan.compressed) == 0:
            raise RuntimeError("nothing was compressed")
        models = (ours, dense)
        forward = timed_in_turn([[_forward(model, batch)] for model in models], row.device, row.repeats)
        step = timed_in_turn([[_step(model, batch)] for model in models], row.device, row.repeats)
        blocks = len({decision.region for decision in plan.compressed})
        return replace(
            row, blocks=blocks, forward=forward[0], dense_forward=forward[1], step=step[0], dense_step=step[1]
        )
    except Exception as error:
        return replace(row, error=f"{type(error).__name__}: {error}")


def _all_compressed(model: nn.Module, batch: dict[str, Tensor]) -> velora_fx.Plan:
    """The plan that compresses all that can be, with sub-tokens of one size."""
    options: dict[str, Any] = {"method": "compress", "optimizer": "none", "sub_token_sizes": (SUB_TOKEN,)}
    try:
        return velora_fx.plan(model, 1e-6, batch, **options)
    except velora_fx.BudgetError as error:
        return error.plan


def _on(batch: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


def _forward(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], object]:
    return lambda: model(**batch)


def _step(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        output = model(**batch)
        (output if isinstance(output, Tensor) else output.loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def overhead_table(rows: Sequence[OverheadRow]) -> str:
    """A line for each model and number of tokens."""
    cells = []
    for row in rows:
        if row.forward is None or row.dense_forward is None or row.step is None or row.dense_step is None:
            cells.append((row.model, str(row.tokens), "failed", "", "", ""))
            continue
        more = (row.forward.median_seconds - row.dense_forward.median_seconds) / max(1, row.blocks)
        cells.append(
            (
                row.model,
                str(row.tokens),
                f"{row.dense_forward.median_seconds * 1e3:.2f}",
                f"x{row.forward.median_seconds / row.dense_forward.median_seconds:.2f}",
                f"x{row.step.median_seconds / row.dense_step.median_seconds:.2f}",
                f"{more * 1e3:+.3f}",
            )
        )
    headers = ("model", "tokens", "dense forward, ms", "forward", "step", "ms more for each block")
    return tabulate(cells, headers, colalign=("left", *["right"] * 5), disable_numparse=True)
