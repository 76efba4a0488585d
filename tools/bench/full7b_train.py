"""One way to train all weights of a model inside a budget: time, memory and loss."""

from __future__ import annotations

import argparse
import contextlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import velora_fx
from tools.accuracy.measure import apart
from tools.accuracy.models import hugging_face
from tools.bench.figures import free, peak_of
from tools.bench.full7b import ENDS, FITS, GIB, OUT_OF_MEMORY, TOO_LARGE, FullRow, complaints_about
from tools.bench.models import MODELS
from tools.bench.results import reason_of
from tools.bench.timing import timing_of
from velora_fx.devices import FIXED_BYTES
from velora_fx.peaks import CONTEXT, WORKSPACES

WARM_UP_STEPS = 3  # that are not timed, the last of which tells a CPU's peak
LEARNING_RATES = {"adamw": 1e-4, "sgd": 0.01}


class OutOfMemory(Exception):
    """The device's memory ended at a moment of the training."""


def measure_full_apart(row: FullRow) -> FullRow:
    """`measure_full` in a process of its own, whose memory alone is limited."""
    return apart(measure_full, row)


def measure_full(row: FullRow) -> FullRow:
    """The row with its figures and what is wrong with them, or with the reason why there are none."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    start = time.perf_counter()
    try:
        if row.device == "cuda":
            limit_memory(row.budget_gb)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row = _train(row)
    except OutOfMemory as error:
        row = replace(row, outcome=f"{OUT_OF_MEMORY}: {error}")
    except Exception as error:
        row = replace(row, error=reason_of(error))
    row = replace(row, seconds=time.perf_counter() - start)
    complaints = "; ".join(complaints_about(row)) if row.way.factored and row.error is None else ""
    return replace(row, error=complaints) if complaints else row


def limit_memory(budget_gb: float) -> None:
    """Has PyTorch's allocator end at the budget less the CUDA context, which takes memory of the GPU besides it."""
    total_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(share_for_tensors(budget_gb, total_bytes))


def share_for_tensors(budget_gb: float, total_bytes: int) -> float:
    """The part of a GPU's memory, from 0 to 1, that tensors may take of a budget."""
    return min(1.0, max(0.0, (budget_gb * GIB - FIXED_BYTES[CONTEXT]) / total_bytes))


def _train(row: FullRow) -> FullRow:
    with _moment("making the model"):
        model = make_full_model(row)
    texts = real_texts(row, model)
    plan = None
    if row.way.factored:
        with _moment("planning"):
            example = dict.fromkeys(("input_ids", "labels"), texts[0].to(row.device))
            velora_fx.optimize(model, row.budget_gb, example, gradients="factored", compiled=row.way.compiled)
        plan = velora_fx.plan_of(model)
    step, optimizers = _step_of(model, row)
    losses: list[float] = []
    seconds: list[float] = []
    peak_bytes, reserved_bytes = 0, None
    for number, text in enumerate(texts, start=1):
        start = time.perf_counter()
        if row.device == "cpu" and number == WARM_UP_STEPS:
            held = [*model.parameters(), *model.buffers(), *_states(optimizers), text]
            peak_bytes = peak_of(lambda text=text: losses.append(step(text, WARM_UP_STEPS)), held, "cpu")  # type: ignore[misc]
        else:
            losses.append(step(text.to(row.device), number))
        seconds.append(time.perf_counter() - start)
        if row.device == "cuda" and number == 1:
            free(row.device)
            torch.cuda.reset_peak_memory_stats()
    if row.device == "cuda":
        peak_bytes, reserved_bytes = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    taken_bytes = peak_bytes if reserved_bytes is None else reserved_bytes + FIXED_BYTES[CONTEXT]
    predicted = None if plan is None else plan.planned
    return replace(
        row,
        outcome=FITS if taken_bytes <= row.budget_gb * GIB else TOO_LARGE,
        step=timing_of(seconds[WARM_UP_STEPS:]),
        peak_bytes=peak_bytes,
        reserved_bytes=reserved_bytes,
        predicted_bytes=None if predicted is None else predicted.tensor_bytes + predicted.overhead.get(WORKSPACES, 0),
        first_loss=sum(losses[:ENDS]) / ENDS,
        last_loss=sum(losses[-ENDS:]) / ENDS,
    )


def make_full_model(row: FullRow) -> nn.Module:
    """A model with random weights, the same each time, made on the device in its dtype: never in a larger one."""
    architecture, sizes = MODELS[row.model]
    default = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(row.dtype)
    try:
        with torch.device(row.device):
            model = hugging_face(architecture, **sizes, attn_implementation="sdpa", use_cache=False)
    finally:
        torch.set_default_dtype(default)
    if row.way.checkpointed:
        enable: Any = model.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def real_texts(row: FullRow, model: nn.Module) -> list[Tensor]:
    """A batch of Python's standard library for each step, its bytes as tokens, none above the vocabulary."""
    from tools.finetune import load_batches  # which imports transformers, and the other benchmarks work without it

    sizes = argparse.Namespace(steps=row.steps, batch_size=row.batch_size, seq_len=row.length, seed=0)
    config: Any = model.config
    return [text % config.vocab_size for text in load_batches(sizes)[0]]


def _step_of(model: nn.Module, row: FullRow) -> tuple[Callable[[Tensor, int], float], list[torch.optim.Optimizer]]:
    """A training step, which takes its number and returns its loss, and its optimizers."""
    groups: list[list[nn.Parameter]] = [[p for p in model.parameters() if p.requires_grad]]
    if row.way.in_backward:
        groups = [[parameter] for parameter in groups[0]]
    optimizers = [_optimizer(parameters, row) for parameters in groups]
    if row.way.in_backward:
        for (parameter,), optimizer in zip(groups, optimizers, strict=True):
            hooked: Any = parameter  # whose method has no types
            hooked.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: _update(optimizer))
    run: Any = torch.compile(model, fullgraph=True) if row.way.compiled else model

    def step(text: Tensor, number: int) -> float:
        with _moment(f"forward of step {number}"):
            loss = run(input_ids=text, labels=text).loss
        with _moment(f"backward of step {number}"):
            loss.backward()
        if not row.way.in_backward:
            with _moment(f"optimizer of step {number}"):
                _update(optimizers[0])
        return float(loss.detach())

    return step, optimizers


def _optimizer(parameters: list[nn.Parameter], row: FullRow) -> torch.optim.Optimizer:
    """On CUDA the rivals' are fused, which takes no temporary memory; that of a plan is the one it was made for."""
    make: Any = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[row.way.optimizer]
    fused = {"fused": True} if row.device == "cuda" and not row.way.factored else {}
    made: torch.optim.Optimizer = make(parameters, lr=LEARNING_RATES[row.way.optimizer], **fused)
    return made


def _update(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _states(optimizers: Sequence[torch.optim.Optimizer]) -> list[Tensor]:
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]


@contextlib.contextmanager
def _moment(name: str) -> Iterator[None]:
    """Has running out of memory in it raise OutOfMemory with the name, also where the compiler wraps that."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, torch.OutOfMemoryError):
                raise OutOfMemory(name) from error
            cause = cause.__cause__ or cause.__context__
        raise
