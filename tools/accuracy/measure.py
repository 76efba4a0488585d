"""Measures the peak of training steps, each in a process of its own."""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import velora_fx
from tools.accuracy.models import CASES, batch_of
from tools.accuracy.table import Row
from velora_fx.peaks import WORKSPACES

GIB = 2**30
PLANS = ("nothing", "half", "all")
WARM_UP_STEPS = 2  # the first makes the optimizer's state, and compiles


def measure(row: Row) -> Row:
    """The row with its figures, or with the reason why there are none."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _measure(row)
    except Exception as error:
        return replace(row, error=" ".join(f"{type(error).__name__}: {error}".split()))


def _measure(row: Row) -> Row:
    torch.manual_seed(0)
    with torch.device(row.device):
        model = CASES[row.device][row.model].make().train()
    model.to(row.device, torch.bfloat16 if row.device == "cuda" else torch.float32)
    batch = batch_of(model, row.batch_size, row.length)
    plan = prepare(model, batch, row.target, row.plan)
    measured, reserved = measured_peak(model, batch, compiled=row.target == "inductor")
    return replace(
        row,
        num_compressed=len(plan.compressed),
        num_candidates=len(plan.decisions),
        moment=plan.planned.moment,
        predicted_bytes=plan.planned.tensor_bytes + plan.planned.overhead.get(WORKSPACES, 0),
        measured_bytes=measured,
        predicted_reserved_bytes=None if reserved is None else plan.planned.peak_bytes,
        reserved_bytes=reserved,
    )


def prepare(model: nn.Module, batch: dict[str, Tensor], target: str, name: str) -> velora_fx.Plan:
    """Applies the plan that `name` (of PLANS) stands for, and returns it."""
    compiled = target == "inductor"
    if name == "nothing":
        return velora_fx.plan(model, None, batch, compiled=compiled)
    try:
        return velora_fx.plan(model, 1 / GIB, batch, compiled=compiled, method="compress")  # no plan meets one byte
    except velora_fx.BudgetError as error:
        tightest = error.plan
    if name == "all":
        velora_fx.apply(model, tightest, batch)
    else:
        budget_bytes = (tightest.planned.peak_bytes + tightest.baseline.peak_bytes) / 2
        velora_fx.optimize(model, budget_bytes / GIB, batch, compiled=compiled, method="compress")
    return velora_fx.plan_of(model)


def measured_peak(model: nn.Module, batch: dict[str, Tensor], compiled: bool) -> tuple[int, int | None]:
    """Peak bytes of a training step, and on CUDA the most that the caching allocator reserved for it."""
    optimizer = torch.optim.AdamW(model.parameters())
    run = torch.compile(model, fullgraph=True) if compiled else model

    def step() -> None:
        output: Any = run(**batch)
        loss = output if isinstance(output, Tensor) else output.loss
        del output
        loss.backward()
        optimizer.step()

    for _ in range(WARM_UP_STEPS):
        step()
        optimizer.zero_grad()
    gc.collect()
    if next(model.parameters()).is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    states = [value for state in optimizer.state.values() for value in state.values()]
    return peak_on_cpu(step, [*model.parameters(), *model.buffers(), *states, *batch.values()]), None


def peak_on_cpu(step: Callable[[], None], held: Iterable[Tensor]) -> int:
    """The most bytes in use during the step: the allocator's events on top of the tensors held before."""
    storages = {id(storage): storage for tensor in held for storage in [tensor.untyped_storage()]}
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports its start and end on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held_bytes = sum(storage.nbytes() for storage in storages.values())
    return held_bytes + max(accumulate((int(event.nbytes()) for event in events), initial=0))
