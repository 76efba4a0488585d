"""One training run."""

from __future__ import annotations

import logging
import math
import statistics
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tools.bench.figures import peak_of
from tools.bench.results import reason_of
from tools.quality.data import Tokens, batch_at, load_tokens, validation_batches
from tools.quality.models import batch_of, compress, make_model, make_optimizer, precision
from tools.quality.rows import Row
from tools.quality.ways import START_RATE, TASKS, WAYS, Task

WARM_UP, LOWEST = 0.1, 0.1  # the share of steps until the highest rate, and the share of that rate at the end
VALIDATED, VALIDATED_BATCHES = 5, 16  # times in a run, and batches each time
MEASURED_STEP = 2  # whose peak is taken: the optimizer has its state, compression its projections


def run(row: Row, tokens: Tokens, cache: Path) -> Row:
    """The row with its figures, or with the reason why there are none."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row = _run(row, tokens, cache)[0]
    except Exception as error:
        row = replace(row, error=reason_of(error))
    return replace(row, seconds=time.perf_counter() - start)


def _run(row: Row, tokens: Tokens, cache: Path) -> tuple[Row, nn.Module]:
    task, device = row.task, row.device
    start = start_weights(task, row.seed, device, cache)
    model = make_model(task, row.way, row.seed, device, start)
    generator = torch.Generator().manual_seed(row.seed)
    ids = [batch_at(tokens.train, task.texts, task.length, generator) for _ in range(row.steps)]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with precision(device):
        num_compressed = compress(model, task, row.way, batch_of(task, ids[0].to(device)), row.seed)
    optimizer = make_optimizer(model, row.way, row.rate, row.seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_rate(step, row.steps))

    def step(batch: dict[str, Tensor]) -> None:
        with precision(device):
            output: Any = model(**batch)
        output.loss.backward()
        if row.way.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), row.way.clip)
        optimizer.step()
        optimizer.zero_grad()

    peak_bytes, times, curve = 0, [], []
    marks = {round(row.steps * (n + 1) / VALIDATED) for n in range(VALIDATED)}
    for number in range(row.steps):
        batch = batch_of(task, ids[number].to(device))
        if number == MEASURED_STEP:
            held = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
            held += [*model.parameters(), *model.buffers(), *batch.values()]
            peak_bytes = peak_of(lambda batch=batch: step(batch), held, device)  # type: ignore[misc]
        else:
            times.append(_seconds_of(step, batch, device))
        schedule.step()
        if number + 1 in marks:
            curve.append((number + 1, validation_loss(model, tokens.validation, task, device)))
            if not math.isfinite(curve[-1][1]):
                break
    return replace(
        row,
        loss=curve[-1][1],
        curve=tuple(curve),
        step_seconds=statistics.median(times),
        peak_bytes=peak_bytes,
        num_compressed=num_compressed,
        num_weights=trained,
    ), model


def share_of_rate(step: int, steps: int) -> float:
    """Of the highest rate: a straight line up over the first steps, then half a cosine down."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return LOWEST + (1 - LOWEST) * (1 + math.cos(math.pi * done)) / 2


def _seconds_of(step: Any, batch: dict[str, Tensor], device: str) -> float:
    start = time.perf_counter()
    step(batch)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def validation_loss(model: nn.Module, tokens: Tensor, task: Task, device: str) -> float:
    """The mean loss of a token over the first batches of the validation text."""
    model.eval()
    losses = []
    for ids in validation_batches(tokens, task.texts, task.length, VALIDATED_BATCHES):
        with precision(device):
            output: Any = model(**batch_of(task, ids.to(device)))
        losses.append(float(output.loss))
    model.train()
    return statistics.fmean(losses)


def start_weights(task: Task, seed: int, device: str, cache: Path) -> dict[str, Tensor] | None:
    """The weights that a task starts from, None for random ones: those of the dense run of another task with the same
    seed, made once and kept in the cache."""
    if not task.start:
        return None
    first = TASKS[task.start]
    tokens = load_tokens(first.text, first.shape.words, first.megabytes, cache)
    rate, steps = START_RATE[task.start], 2 * first.steps
    row = Row(task.start, first, "dense", WAYS["dense"], device, tokens.corpus, seed, rate, steps)
    file = cache / f"{task.start}-{tokens.corpus}-{seed}-{rate:g}-{steps}.pt"
    if not file.is_file():
        torch.save(_run(row, tokens, cache)[1].state_dict(), file)
    weights: dict[str, Tensor] = torch.load(file, map_location=device)
    return weights
