"""A training step of a model, trained in one of several ways: time, memory, and the error of its gradients."""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import velora_fx
from tools.accuracy.models import batch_of
from tools.bench.figures import compressed_weights, free, gradient_errors, held_bytes, peak_of
from tools.bench.models import compressible, make_model, sub_token_sizes, tokens_of
from tools.bench.plan_files import read_plan
from tools.bench.results import reason_of
from tools.bench.timing import Stopwatch, Timing, timed, timed_steps
from velora_fx.peaks import WORKSPACES

WARM_UP_STEPS = 3  # besides the first; on CUDA optimize measures a peak of its own until the second has ended
MAX_GRAD_NORM = 1.0
# Of exact gradients: in bfloat16 two exact ways to compute one differ by 0.03 already in small Llamas and ViTs.
EXACT_BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.25}


@dataclass(frozen=True)
class Way:
    """How a model is trained. `compresses` and `adapter` are "" for neither; `settings` are those of torch._functorch.

    `is_planned` says whether velora_fx predicts a peak for it: of an untouched way with the plan of the compressed one.
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
    against the untouched eager model from the same start. `products_seconds` is what the dense gradients of the
    compressed weights take, as products alone: no more than that can be saved of a step.

    Of the `seconds` that the row took in all, planning (reading a plan and applying it where `has_plan_file`), the
    first forward and backward pass (which compile), and all steps are told apart.
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
    num_linears: int = 0
    compressed_error: float | None = None
    exact_error: float = 0.0
    products_seconds: float | None = None
    has_plan_file: bool = False
    planning_seconds: float = 0.0
    compiling_seconds: float = 0.0
    steps_seconds: float = 0.0
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

    @property
    def plan_name(self) -> str:
        """The name of the file of its plan: rows with one plan have one name, "" without a plan."""
        way = self.way
        if not way.is_planned:
            return ""
        kind = [
            way.adapter,
            "compiled" if way.compiled else "eager",
            way.compresses or "all",
            "exact" * bool(way.settings),
        ]
        batch = f"{self.batch_size}" if self.length is None else f"{self.batch_size}x{self.length}"
        return "-".join(filter(None, [self.device, self.model, batch, *kind, f"M{self.sub_token_size}"]))


def measure(row: TrainRow, plans: Path | None = None) -> TrainRow:
    """The row with its figures, or with the reason why there are none; its plan is in the folder, or made."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    watch = Stopwatch()
    try:
        with warnings.catch_warnings(), _settings(row.way.settings):
            warnings.simplefilter("ignore")
            row = _measure(row, read_plan(plans, row.plan_name))
    except Exception as error:
        row = replace(row, error=reason_of(error))
    return replace(row, seconds=watch.lap())


def _settings(settings: Mapping[str, Any] | None) -> contextlib.AbstractContextManager[Any]:
    config: Any = importlib.import_module("torch._functorch.config")
    patched: contextlib.AbstractContextManager[Any] = config.patch(dict(settings or {}))
    return patched


@dataclass(frozen=True)
class Training:
    """A model with its optimizer on one batch; `run` is the model as it is called, perhaps compiled."""

    model: nn.Module
    run: Any
    optimizer: torch.optim.Optimizer
    batch: dict[str, Tensor]

    def forward(self) -> Tensor:
        """The loss."""
        loss: Tensor = self.run(**self.batch).loss
        return loss

    def update(self) -> None:
        """One step of the optimizer, with clipped gradients, which are let go of."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """A whole training step."""
        self.forward().backward()  # type: ignore[no-untyped-call]
        self.update()

    def tensors(self) -> list[Tensor]:
        """What is there between two steps."""
        states = [
            each for state in self.optimizer.state.values() for each in state.values() if isinstance(each, Tensor)
        ]
        return [*self.model.parameters(), *self.model.buffers(), *states, *self.batch.values()]


def _measure(row: TrainRow, plan: velora_fx.Plan | None) -> TrainRow:
    has_plan_file = plan is not None
    reference = untouched_gradients(row)
    free(row.device)
    model = make_model(row.model, row.way.adapter, row.device, row.dtype, row.sub_token_size)
    optimizer, batch = optimizer_of(model, row), batch_of(model, row.batch_size, row.length)
    watch = Stopwatch()
    plan = prepare(model, optimizer, batch, row, plan)
    planning_seconds = watch.lap()
    run = torch.compile(model, fullgraph=True) if row.way.compiled else model
    training = Training(model, run, optimizer, batch)
    training.forward().backward()  # type: ignore[no-untyped-call]
    if row.device == "cuda":
        torch.cuda.synchronize()
    compiling_seconds = watch.lap()
    compressed = compressed_weights(model, plan if row.way.compresses else None)
    if row.way.compresses and not compressed:
        raise RuntimeError("nothing was compressed")
    errors = gradient_errors(model, reference, compressed)
    require_right(*errors, row.dtype)
    del reference
    training.update()
    row = _with_steps(row, training)
    steps_seconds = watch.lap()
    peak = None if plan is None else (plan.planned if row.way.compresses else plan.baseline)
    return replace(
        row,
        predicted_bytes=None if peak is None else peak.tensor_bytes + peak.overhead.get(WORKSPACES, 0),
        num_compressed=len(compressed),
        num_linears=sum(isinstance(m, nn.Linear) and m.weight.requires_grad for m in model.modules()),
        compressed_error=errors[0],
        exact_error=errors[1],
        products_seconds=products_seconds(model, compressed, row.tokens, row) if compressed else None,
        has_plan_file=has_plan_file,
        planning_seconds=planning_seconds,
        compiling_seconds=compiling_seconds,
        steps_seconds=steps_seconds,
    )


def _with_steps(row: TrainRow, training: Training) -> TrainRow:
    """The row with what steps keep, hold and take, once they are warm."""
    for _ in range(WARM_UP_STEPS):
        training.step()
    saved_bytes = held_bytes(training.forward, row.device)
    peak_bytes = peak_of(training.step, training.tensors(), row.device)
    step_timing = timed_steps(training.step, row.device, row.repeats)
    tokens = tokens_of(training.batch, training.model)
    return replace(row, tokens=tokens, step=step_timing, peak_bytes=peak_bytes, saved_bytes=saved_bytes)


def products_seconds(model: nn.Module, weights: set[str], tokens: int, row: TrainRow) -> float:
    """What the dense gradients of these weights take as products alone, each shape timed by itself.

    Their sizes are rounded up to multiples of 8, as a compiler pads them.
    """
    shapes = Counter(tuple(-(-size // 8) * 8 for size in model.get_parameter(name).shape) for name in weights)
    seconds = 0.0
    for (out, width), count in shapes.items():
        dy, x = (torch.randn(tokens, size, device=row.device).to(row.dtype) for size in (out, width))
        timing = timed([lambda dy=dy, x=x: dy.t() @ x], row.device, row.repeats)  # type: ignore[misc]
        seconds += count * timing.median_seconds
    return seconds


def require_right(compressed_error: float | None, exact_error: float, dtype: torch.dtype) -> None:
    """Raises a RuntimeError for exact gradients that are wrong, and compressed ones that are not finite."""
    if not exact_error <= EXACT_BOUNDS[dtype]:  # so that NaN is wrong too
        raise RuntimeError(f"exact gradients are off by {exact_error:.2g}, allowed {EXACT_BOUNDS[dtype]:.2g}")
    if compressed_error is not None and not math.isfinite(compressed_error):
        raise RuntimeError("compressed gradients are not finite")


def optimizer_of(model: nn.Module, row: TrainRow) -> torch.optim.Optimizer:
    """AdamW of all that is trained, on CUDA the fused one."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, fused=True if row.device == "cuda" else None)


def prepare(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    row: TrainRow,
    plan: velora_fx.Plan | None = None,
) -> velora_fx.Plan | None:
    """Makes the model train as the row says, but for the compiler, by the plan that is given or by its own; returns
    that where there is one."""
    if row.way.checkpointed:
        enable: Any = model.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if plan is None and row.way.is_planned:
        plan = plan_for(model, optimizer, batch, row, row.device)
    if plan is not None and row.way.compresses:
        velora_fx.apply(model, plan, batch)
    return plan


def plan_ahead(row: TrainRow) -> velora_fx.Plan:
    """The plan of a row, made of a model without memory: the device need not be there."""
    with warnings.catch_warnings(), _settings(row.way.settings):
        warnings.simplefilter("ignore")
        model = make_model(row.model, row.way.adapter, "meta", row.dtype, row.sub_token_size)
        batch = batch_of(model, row.batch_size, row.length)
        return plan_for(model, optimizer_of(model, row), batch, row, row.device)


def plan_for(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], row: TrainRow, device: str
) -> velora_fx.Plan:
    """The plan of a compressed row for a device, and of an untouched one that of all compressed."""
    sizes = sub_token_sizes(model, row.sub_token_size)
    options: dict[str, Any] = {
        "sub_token_sizes": sizes, "compiled": row.way.compiled, "optimizer": optimizer, "device": device,
    }  # fmt: skip
    if not row.way.adapter:
        only = compressible(row.way.compresses or "all")
        return velora_fx.plan(model, None, batch, objective="speed", filter_fn=only, **options)
    try:  # adapters' products are small: they are compressed for memory, all of them
        return velora_fx.plan(model, 1e-9, batch, method="compress", **options)  # no plan meets one byte
    except velora_fx.BudgetError as error:
        return replace(error.plan, budget_bytes=None)


def untouched_gradients(row: TrainRow) -> dict[str, Tensor]:
    """The gradients of the untouched eager model on the same batch, on the CPU, by the parameters' names."""
    model = make_model(row.model, row.way.adapter and "lora", row.device, row.dtype, row.sub_token_size)
    with _settings(None):
        model(**batch_of(model, row.batch_size, row.length)).loss.backward()
    return {name: p.grad.detach().cpu() for name, p in model.named_parameters() if p.grad is not None}
