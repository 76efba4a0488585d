"""One way to train a model inside a budget: time, memory and loss."""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import velora_fx
from tools.accuracy.models import hugging_face
from tools.bench.figures import free, peak_of
from tools.bench.full7b import ENDS, FITS, GIB, OUT_OF_MEMORY, TOO_LARGE, FullRow, complaints_about
from tools.bench.models import MODELS, with_adapter
from tools.bench.plan_files import read_plan
from tools.bench.results import reason_of
from tools.bench.timing import Stopwatch, timing_of
from tools.quality.data import batch_at, cache_folder, load_tokens
from velora_fx.devices import FIXED_BYTES
from velora_fx.peaks import CONTEXT, WORKSPACES

WARM_UP_STEPS = 3  # that are not timed, the last of which tells a CPU's peak
MOST_WORDS, MEGABYTES = 32000, 4  # of the vocabulary and of the text
EIGHT_BIT = (("bitsandbytes.optim", "AdamW8bit"), ("torchao.optim", "AdamW8bit"))  # the first that is installed


class OutOfMemory(Exception):
    """The device's memory ended at a moment of the training."""


class FusedAdamW(torch.optim.AdamW):
    """AdamW in one kernel, which takes no temporary memory, also where PyTorch would choose another by itself."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr=lr, fused=True)


@dataclass
class Training:
    """What the steps of a row at one rate told: their losses and seconds, and the peak on a CPU."""

    losses: list[float]
    seconds: list[float]
    peak_bytes: int = 0


def measure_full(row: FullRow, texts: Sequence[Tensor] | None = None, plans: Path | None = None) -> FullRow:
    """The row with its figures and what is wrong with them, or with the reason why there are none.

    It is trained on these texts, by default on `real_texts`; its plan is in the folder, or made.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    watch = Stopwatch()
    try:
        if row.device == "cuda" and row.budget_gb is not None:
            limit_memory(row.budget_gb)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row = _train(row, real_texts(row) if texts is None else texts, read_plan(plans, row.plan_name))
    except OutOfMemory as error:
        row = replace(row, outcome=f"{OUT_OF_MEMORY}: {error}")
    except Exception as error:
        row = replace(row, error=reason_of(error))
    row = replace(row, seconds=watch.lap())
    complaints = "; ".join(complaints_about(row)) if row.way.sub_token_size and row.error is None else ""
    return replace(row, error=complaints) if complaints else row


def limit_memory(budget_gb: float) -> None:
    """Has PyTorch's allocator end at the budget less the CUDA context, which takes memory of the GPU besides it."""
    total_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(share_for_tensors(budget_gb, total_bytes))


def share_for_tensors(budget_gb: float, total_bytes: int) -> float:
    """The part of a GPU's memory, from 0 to 1, that tensors may take of a budget."""
    return min(1.0, max(0.0, (budget_gb * GIB - FIXED_BYTES[CONTEXT]) / total_bytes))


def _train(row: FullRow, texts: Sequence[Tensor], plan: velora_fx.Plan | None) -> FullRow:
    optimizer_class = optimizer_class_of(row)
    with _moment("making the model"):
        model = make_full_model(row, row.device)
    watch, has_plan_file = Stopwatch(), plan is not None
    example = dict.fromkeys(("input_ids", "labels"), texts[0].to(row.device))
    if plan is None and row.way.is_planned:
        with _moment("planning"):
            plan = plan_for(model, example, row, row.device)
    if row.way.sub_token_size and plan is not None:
        with _moment("planning"):
            velora_fx.apply(model, _fitting(plan), example)
    planning_seconds = watch.lap()
    run: Any = torch.compile(model, fullgraph=True) if row.way.compiled else model
    start = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict(keep_vars=True).items()}
    trainings: list[Training] = []
    for rate in row.way.rates:
        if trainings:
            model.load_state_dict(start, strict=False)  # carriers are zero as they were, and in no state
        with _stepping(model, run, optimizer_class, rate, row) as (step, optimizers):
            trainings.append(_trained(step, optimizers, model, texts, row, is_first=not trainings))
    steps_seconds = watch.lap()
    reserved_bytes = torch.cuda.max_memory_reserved() if row.device == "cuda" else None
    peak_bytes = torch.cuda.max_memory_allocated() if row.device == "cuda" else trainings[0].peak_bytes
    taken_bytes = peak_bytes if reserved_bytes is None else reserved_bytes + FIXED_BYTES[CONTEXT]
    compiling_seconds = trainings[0].seconds[0]
    peak = None if plan is None else (plan.planned if row.way.sub_token_size else plan.baseline)
    ends = max(1, round(ENDS * row.steps))
    last_losses = [sum(training.losses[-ends:]) / ends for training in trainings]
    best = min(range(len(trainings)), key=lambda number: (math.isnan(last_losses[number]), last_losses[number]))
    return replace(
        row,
        outcome=FITS if row.budget_gb is None or taken_bytes <= row.budget_gb * GIB else TOO_LARGE,
        step=timing_of([second for training in trainings for second in training.seconds[WARM_UP_STEPS:]]),
        peak_bytes=peak_bytes,
        reserved_bytes=reserved_bytes,
        predicted_bytes=None if peak is None else peak.tensor_bytes + peak.overhead.get(WORKSPACES, 0),
        rate=row.way.rates[best],
        first_loss=sum(trainings[best].losses[:ends]) / ends,
        last_loss=last_losses[best],
        last_losses=tuple(last_losses),
        has_plan_file=has_plan_file,
        planning_seconds=planning_seconds,
        compiling_seconds=compiling_seconds,
        steps_seconds=steps_seconds - compiling_seconds,
    )


def _trained(
    step: Callable[[Tensor, int], float],
    optimizers: Sequence[torch.optim.Optimizer],
    model: nn.Module,
    texts: Sequence[Tensor],
    row: FullRow,
    is_first: bool,
) -> Training:
    """Trains on one text after the other."""
    found = Training([], [])
    for number, text in enumerate(texts, start=1):
        watch = Stopwatch()
        if row.device == "cpu" and number == WARM_UP_STEPS and is_first:
            held = [*model.parameters(), *model.buffers(), *_states(optimizers), text]
            found.peak_bytes = peak_of(lambda text=text: found.losses.append(step(text, WARM_UP_STEPS)), held, "cpu")  # type: ignore[misc]
        else:
            found.losses.append(step(text.to(row.device), number))
        found.seconds.append(watch.lap())
        if row.device == "cuda" and number == 1 and is_first:
            free(row.device)
            torch.cuda.reset_peak_memory_stats()
    return found


def plan_ahead(row: FullRow) -> velora_fx.Plan:
    """The plan of a row, made of a model without memory: the device need not be there. It may not fit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        words = torch.zeros(row.batch_size, row.length, dtype=torch.int64)
        return plan_for(make_full_model(row, "meta"), dict.fromkeys(("input_ids", "labels"), words), row, row.device)


def plan_for(model: nn.Module, example: dict[str, Tensor], row: FullRow, device: str) -> velora_fx.Plan:
    """The plan of a row for a device: within its budget, or for speed where there is none; the tightest one where none
    fits, and of a row without velora_fx the untouched step."""
    way = row.way
    options: dict[str, Any] = {"compiled": way.compiled, "optimizer": optimizer_class_of(row), "device": device}
    if way.sub_token_size is None:
        return velora_fx.plan(model, None, example, **options)
    options |= {"gradients": "factored", "sub_token_sizes": (way.sub_token_size,)}
    options |= {"method": "auto" if way.recomputes else "compress"}
    try:
        objective = "speed" if row.budget_gb is None else "memory"
        return velora_fx.plan(model, row.budget_gb, example, objective=objective, **options)
    except velora_fx.BudgetError as error:
        return error.plan


def _fitting(plan: velora_fx.Plan) -> velora_fx.Plan:
    if plan.fits:
        return plan
    smallest, budget = plan.planned.peak_bytes / GIB, (plan.budget_bytes or 0) / GIB
    raise ValueError(f"no plan fits {budget:.4g} GiB: the smallest peak is {smallest:.4g} GiB")


def make_full_model(row: FullRow, device: str) -> nn.Module:
    """A model with random weights, the same each time, made on the device in its dtype: never in a larger one."""
    architecture, sizes = MODELS[row.model]
    default = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(row.dtype)
    try:
        with torch.device(device):
            model = hugging_face(architecture, **sizes, attn_implementation="sdpa", use_cache=False)
            model = with_adapter(model, "lora", 0).to(row.dtype) if row.way.is_lora else model
    finally:
        torch.set_default_dtype(default)
    if row.way.checkpointed:
        enable: Any = model.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def real_texts(row: FullRow, cache: Path | None = None) -> list[Tensor]:
    """A batch of Python source, as tools/quality trains on, for each step: tokens, none above the vocabulary."""
    words = min(MODELS[row.model][1]["vocab_size"], MOST_WORDS)
    tokens = load_tokens("python", words, MEGABYTES, cache or cache_folder()).train
    generator = torch.Generator().manual_seed(0)
    return [batch_at(tokens, row.batch_size, row.length, generator) for _ in range(row.steps)]


@contextlib.contextmanager
def _stepping(
    model: nn.Module, run: Any, optimizer_class: Any, rate: float, row: FullRow
) -> Iterator[tuple[Callable[[Tensor, int], float], Sequence[torch.optim.Optimizer]]]:
    """A training step, which takes a text and its number and returns its loss, and its optimizers."""
    groups: list[list[nn.Parameter]] = [[p for p in model.parameters() if p.requires_grad]]
    if row.way.in_backward:
        groups = [[parameter] for parameter in groups[0]]
    optimizers: list[torch.optim.Optimizer] = [optimizer_class(parameters, lr=rate) for parameters in groups]
    handles = []
    if row.way.in_backward:
        for (parameter,), optimizer in zip(groups, optimizers, strict=True):
            hooked: Any = parameter  # whose method has no types
            handles.append(hooked.register_post_accumulate_grad_hook(lambda _, own=optimizer: _update(own)))

    def step(text: Tensor, number: int) -> float:
        with _moment(f"forward of step {number}"):
            loss = run(input_ids=text, labels=text).loss
        with _moment(f"backward of step {number}"):
            loss.backward()
        if not row.way.in_backward:
            with _moment(f"optimizer of step {number}"):
                _update(optimizers[0])
        return float(loss.detach())

    yield step, optimizers
    for handle in handles:
        handle.remove()


def optimizer_class_of(row: FullRow) -> Any:
    """The optimizer of a row; a ModuleNotFoundError says what to install for one in 8 bits."""
    if row.way.optimizer == "adamw-8bit":
        for module, name in EIGHT_BIT:
            with contextlib.suppress(ModuleNotFoundError):
                return getattr(importlib.import_module(module), name)
        raise ModuleNotFoundError("not installed: pip install bitsandbytes, or torchao")
    return {"adamw": FusedAdamW, "sgd": torch.optim.SGD}[row.way.optimizer]


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
