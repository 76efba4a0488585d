"""What the caller may ask for, checked once."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, Literal, TypeVar

import torch

GIB = 2**30
PROJECTIONS = ("signs", "batch_mean")
METHODS = ("auto", "compress", "exact")
GRADIENTS = ("dense", "factored")
OBJECTIVES = ("memory", "speed")
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keyword arguments of `optimize` and `plan`: their names and defaults are stated here alone.

    They are described in the docstring of `optimize`. Raises ValueError for a value that is not allowed.
    """

    method: str = "auto"
    compiled: bool | Literal["blocks"] | None = None
    optimizer: Any = "adamw"
    gradients: str = "dense"
    objective: str = "memory"
    sub_token_sizes: Sequence[int] | None = None
    projection: str = "signs"
    filter_fn: Callable[[torch.nn.Module, str], bool] | None = None
    loss_fn: Callable[[Any], torch.Tensor] | None = None
    gradient_accumulation: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        if not (self.compiled is None or isinstance(self.compiled, bool) or self.compiled == "blocks"):
            raise ValueError(f"compiled must be True, 'blocks', False or None (to find out), got {self.compiled!r}")
        _one_of("gradients", self.gradients, GRADIENTS)
        _one_of("projection", self.projection, PROJECTIONS)
        _one_of("objective", self.objective, OBJECTIVES)
        self._check_combinations()
        sizes = self.sub_token_sizes
        if sizes is not None and (
            isinstance(sizes, (str, int, float))
            or not sizes
            or any(type(size) is not int or size < 2 for size in sizes)
        ):
            raise ValueError(f"sub_token_sizes must be integers of at least 2, for example (16, 32), got {sizes!r}")
        functions: dict[str, Any] = {"filter_fn": self.filter_fn, "loss_fn": self.loss_fn}
        for name, function in functions.items():
            if function is not None and not callable(function):
                signature = "filter_fn(module, name)" if name == "filter_fn" else "loss_fn(output)"
                raise ValueError(f"{name} must be a function {signature}, got {function!r}")
        batches = self.gradient_accumulation
        if type(batches) is not int or batches < 1:
            raise ValueError(f"gradient_accumulation must be a number of batches, at least 1, got {batches!r}")
        if type(self.seed) is not int:
            raise ValueError(f"seed must be an integer, got {self.seed!r}")

    @property
    def is_factored(self) -> bool:
        """True where compressed weights have factored gradients."""
        return self.gradients == "factored"

    @property
    def compresses(self) -> bool:
        """True where saved tensors may be compressed."""
        return self.method != "exact"

    @property
    def recomputes(self) -> bool:
        """True where blocks may be recomputed in backward."""
        return self.method != "compress"

    def _check_combinations(self) -> None:
        if self.is_factored and self.projection != "signs":
            raise ValueError(
                "gradients='factored' is exact for projections of equal magnitudes alone: leave projection at 'signs', "
                f"got {self.projection!r}"
            )
        if self.is_factored and not self.compresses:
            raise ValueError(
                "method='exact' never compresses, and gradients are factored where that is done: leave one of them out"
            )
        if self.objective == "speed" and not self.compresses:
            raise ValueError(
                "method='exact' never compresses, and objective='speed' does nothing else: leave one of them out"
            )


def options_from(given: Mapping[str, Any]) -> Options:
    """The options of a call; TypeError, with the names that there are, for one that is unknown."""
    known = [field.name for field in fields(Options)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(f"there is no option {', '.join(unknown)}: the options are {', '.join(known)}")
    return Options(**given)


def with_options(function: Function) -> Function:
    """The function, whose signature names each of its `**options`, for `help` and editors."""
    own = inspect.signature(function)
    shown = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    shown += [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in fields(Options)
    ]
    function.__signature__ = own.replace(parameters=shown)  # type: ignore[attr-defined]
    return function


def _as_float(number: Real) -> float:
    """The number as a float: infinite where it is too large."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")


def budget_bytes_of(budget_gb: Any, device: torch.device) -> int:
    """Bytes of a budget in GiB, or of "device": all memory the device has.

    What the device holds besides tensors is not taken off here: it is a part of the peaks that a budget is compared
    with. Warns of a budget above what the device has, where it is at hand. Raises ValueError for a budget that is not a
    positive finite number.
    """
    if budget_gb == "device":
        if device.type != "cuda":
            raise ValueError(f'budget_gb="device" needs a CUDA device, and the model is planned for {device.type}')
        capacity_bytes = _capacity_bytes(device)
        if capacity_bytes is None:
            raise ValueError(
                f'budget_gb="device" needs a CUDA device, and this machine has no {device}: pass a number of GiB'
            )
        return capacity_bytes
    number = _number_in(budget_gb) if isinstance(budget_gb, str) else budget_gb
    if isinstance(number, bool) or not isinstance(number, Real):
        raise ValueError(f'budget_gb must be a number of GiB such as 24 or "24GiB", or "device", got {budget_gb!r}')
    size = _as_float(number) * GIB
    if not (math.isfinite(size) and size > 0):
        raise ValueError(f"budget_gb must be a positive number of GiB, got {budget_gb!r}")
    budget_bytes = int(size)
    capacity_bytes = _capacity_bytes(device)
    if capacity_bytes is not None and budget_bytes > capacity_bytes:
        warnings.warn(
            f"velora_fx: the budget of {budget_bytes / GIB:.2f} GiB is above the {capacity_bytes / GIB:.2f} GiB that "
            f'{device} has: budget_gb="device" takes what there is',
            stacklevel=3,
        )
    return budget_bytes


def _number_in(text: str) -> float | None:
    """The number in "24", "24GiB" or "24 GiB"; None for other text."""
    try:
        return float(text.strip().removesuffix("GiB"))
    except ValueError:
        return None


def _capacity_bytes(device: torch.device) -> int | None:
    """All memory of a CUDA device, None where it is not at hand."""
    if device.type != "cuda" or (device.index or 0) >= torch.cuda.device_count():
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


def planning_device(model: torch.nn.Module, device: str | torch.device | None = None) -> torch.device:
    """The device that is planned for: the one asked for, else the model's own (CPU for a meta model).

    Raises ValueError for one that is neither CPU nor CUDA.
    """
    if device is None:
        first = next(model.parameters(), None)
        is_real = first is not None and first.device.type in ("cpu", "cuda")
        return first.device if first is not None and is_real else torch.device("cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}") from error
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    return found
