"""A training step of a model, trained in one of several ways: time, memory, and the error of its gradients."""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import velora_fx
from tools.accuracy.measure import apart
from tools.accuracy.models import batch_of
from tools.bench.figures import compressed_weights, free, gradient_errors, held_bytes, peak_of
from tools.bench.models import compressible, make_model, sub_token_sizes, tokens_of
from tools.bench.results import reason_of
from tools.bench.timing import Timing, timed_steps
from velora_fx.peaks import WORKSPACES

WARM_UP_STEPS = 3  # besides the first; on CUDA optimize measures a peak of its own until the second has ended
MAX_GRAD_NORM = 1.0
# Of exact gradients: in bfloat16 two exact ways to compute one differ by 0.03 already in small Llamas and ViTs.
EXACT_BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.25}


@dataclass(frozen=True)
class Way:
    """How a model is trained. `compresses` and `adapter` are "" for neither; `settings` are those of torch._functorch.

    `is_planned` says whether velora_fx predicts a peak for it.
    """

    compiled: bool = False
    checkpointed: bool = False
    compresses: str = ""
    adapter: str = ""
    settings: Mapping[str, Any] | None = None
    is_planned: bool = True


@dataclass(frozen=True)
class TrainRow:
    """One way to train one model, with its figures or the reason why there are none.

    Bytes compare as in tools/accuracy. `saved_bytes` is what is held from forward to backward. `compressed_error` is
    the relative error of all compressed weights' gradients together, `exact_error` the largest of all others, both
    against the untouched eager model from the same start; `seconds` is what the row took in all.
    """

    model: str
    name: str
    way: Way
    device: str
    batch_size: int
    length: int | None
    sub_token_size: int
    repeats: int
    tokens: int = 0
    step: Timing | None = None
    peak_bytes: int = 0
    predicted_bytes: int | None = None
    saved_bytes: int = 0
    num_compressed: int = 0
    num_candidates: int | None = None
    compressed_error: float | None = None
    exact_error: float = 0.0
    planning_seconds: float | None = None
    seconds: float = 0.0
    error: str | None = None

    def __str__(self) -> str:
        return f"{self.model}, {self.name}"

    @property
    def tokens_per_second(self) -> float:
        """Tokens, or patches of images, of a batch over the median step."""
        return 0.0 if self.step is None else self.tokens / self.step.median_seconds

    @property
    def dtype(self) -> torch.dtype:
        """What the model and its batch are in."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32


def measure_apart(row: TrainRow) -> TrainRow:
    """`measure` in a process of its own."""
    return apart(measure, row)


def measure(row: TrainRow) -> TrainRow:
    """The row with its figures, or with the reason why there are none."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    start = time.perf_counter()
    try:
        with warnings.catch_warnings(), _settings(row.way.settings):
            warnings.simplefilter("ignore")
            row = _measure(row)
    except Exception as error:
        row = replace(row, error=reason_of(error))
    return replace(row, seconds=time.perf_counter() - start)


def _settings(settings: Mapping[str, Any] | None) -> contextlib.AbstractContextManager[Any]:
    config: Any = importlib.import_module("torch._functorch.config")
    patched: contextlib.AbstractContextManager[Any] = config.patch(dict(settings or {}))
    return patched


def _measure(row: TrainRow) -> TrainRow:
    reference = untouched_gradients(row)
    free(row.device)
    model = make_model(row.model, row.way.adapter, row.device, row.dtype, row.sub_token_size)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True if row.device == "cuda" else None)
    batch = batch_of(model, row.batch_size, row.length)
    start = time.perf_counter()
    plan = prepare(model, optimizer, batch, row)
    planning_seconds = None if plan is None else time.perf_counter() - start
    run: Any = torch.compile(model, fullgraph=True) if row.way.compiled else model

    def forward() -> Tensor:
        loss: Tensor = run(**batch).loss
        return loss

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def step() -> None:
        forward().backward()  # type: ignore[no-untyped-call]
        update()

    forward().backward()  # type: ignore[no-untyped-call]
    compressed = compressed_weights(model, plan)
    if row.way.compresses and not compressed:
        raise RuntimeError("nothing was compressed")
    errors = gradient_errors(model, reference, compressed)
    require_right(*errors, row.dtype)
    del reference
    update()
    for _ in range(WARM_UP_STEPS):
        step()
    saved_bytes = held_bytes(forward, row.device)
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    peak_bytes = peak_of(step, [*model.parameters(), *model.buffers(), *states, *batch.values()], row.device)
    peak = None if plan is None else (plan.planned if row.way.compresses else plan.baseline)
    return replace(
        row,
        tokens=tokens_of(batch, model),
        step=timed_steps(step, row.device, row.repeats),
        peak_bytes=peak_bytes,
        predicted_bytes=None if peak is None else peak.tensor_bytes + peak.overhead.get(WORKSPACES, 0),
        saved_bytes=saved_bytes,
        num_compressed=len(compressed),
        num_candidates=len(plan.decisions) if plan is not None else None,
        compressed_error=errors[0],
        exact_error=errors[1],
        planning_seconds=planning_seconds,
    )


def require_right(compressed_error: float | None, exact_error: float, dtype: torch.dtype) -> None:
    """Raises a RuntimeError for exact gradients that are wrong, and compressed ones that are not finite."""
    if not exact_error <= EXACT_BOUNDS[dtype]:  # so that NaN is wrong too
        raise RuntimeError(f"exact gradients are off by {exact_error:.2g}, allowed {EXACT_BOUNDS[dtype]:.2g}")
    if compressed_error is not None and not math.isfinite(compressed_error):
        raise RuntimeError("compressed gradients are not finite")


def prepare(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    row: TrainRow,
    planned_on: str | None = None,
) -> velora_fx.Plan | None:
    """Makes the model train as the row says, but for the compiler; returns the plan where there is one.

    `planned_on` is the device whose rates say what is faster compressed (default: the row's).
    """
    if row.way.checkpointed:
        enable: Any = model.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if row.way.compresses:
        sizes = sub_token_sizes(model, row.sub_token_size)
        common: dict[str, Any] = {"sub_token_sizes": sizes, "compiled": row.way.compiled, "optimizer": optimizer}
        if row.way.adapter:  # adapters' products are small: they are compressed for memory, all of them
            plan = _tightest(model, batch, {**common, "device": planned_on})
        else:
            plan = velora_fx.plan(
                model, None, batch, objective="speed",
                filter_fn=compressible(row.way.compresses), device=planned_on, **common,
            )  # fmt: skip
        velora_fx.apply(model, plan, batch)
        return velora_fx.plan_of(model)
    return (
        velora_fx.plan(model, None, batch, compiled=row.way.compiled, optimizer=optimizer)
        if row.way.is_planned
        else None
    )


def _tightest(model: nn.Module, batch: dict[str, Tensor], options: dict[str, Any]) -> velora_fx.Plan:
    try:
        return velora_fx.plan(model, 1e-9, batch, method="compress", **options)  # no plan meets one byte
    except velora_fx.BudgetError as error:
        return error.plan


def untouched_gradients(row: TrainRow) -> dict[str, Tensor]:
    """The gradients of the untouched eager model on the same batch, on the CPU, by the parameters' names."""
    model = make_model(row.model, row.way.adapter and "lora", row.device, row.dtype, row.sub_token_size)
    with _settings(None):
        model(**batch_of(model, row.batch_size, row.length)).loss.backward()
    return {name: p.grad.detach().cpu() for name, p in model.named_parameters() if p.grad is not None}


def rows_for(
    ways: Mapping[str, Way], cases: Mapping[str, tuple[int, int | None]], common: Mapping[str, Any]
) -> Iterator[TrainRow]:
    """The rows to measure: every way for every model of so many texts or images, of so many tokens."""
    for model, (batch_size, length) in cases.items():
        for name, way in ways.items():
            yield TrainRow(model, name, way, batch_size=batch_size, length=length, **common)
