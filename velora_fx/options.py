"""What the caller may ask for, checked once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch

GIB = 2**30
PROJECTIONS = ("signs", "batch_mean")
TARGETS = ("eager", "inductor")
GRADIENTS = ("dense", "factored")
OBJECTIVES = ("memory", "speed")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keyword arguments of `optimize` and `plan` besides model, budget and inputs; they are described there.

    Raises ValueError for a value that is not allowed.
    """

    optimizer: Any = "adamw"
    target: str = "eager"
    gradients: str = "dense"
    projection: str = "signs"
    sub_token_sizes: Sequence[int] | None = None
    filter_fn: Callable[[torch.nn.Module, str], bool] | None = None
    loss_fn: Callable[[Any], torch.Tensor] | None = None
    gradient_accumulation: int = 1
    exact_only: bool = False
    recompute: bool = False
    objective: str = "memory"
    max_approximation: float | None = None
    device: str | torch.device | None = None
    seed: int = 0
    measure: bool = False

    def __post_init__(self) -> None:
        _one_of("target", self.target, TARGETS)
        _one_of("gradients", self.gradients, GRADIENTS)
        _one_of("projection", self.projection, PROJECTIONS)
        _one_of("objective", self.objective, OBJECTIVES)
        self._check_gradients()
        self._check_approximation()
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
        for name, flag in {"exact_only": self.exact_only, "recompute": self.recompute}.items():
            if type(flag) is not bool:
                raise ValueError(f"{name} must be True or False, got {flag!r}")
        if type(self.seed) is not int:
            raise ValueError(f"seed must be an integer, got {self.seed!r}")
        if type(self.measure) is not bool:
            raise ValueError(f"measure must be True or False, got {self.measure!r}")
        if self.device is not None:
            try:
                kind = torch.device(self.device).type
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"device must be 'cpu' or 'cuda', got {self.device!r}") from error
            if kind not in ("cpu", "cuda"):
                raise ValueError(f"device must be 'cpu' or 'cuda', got {self.device!r}")

    @property
    def is_factored(self) -> bool:
        """True where compressed weights have factored gradients."""
        return self.gradients == "factored"

    def _check_gradients(self) -> None:
        if self.is_factored and self.projection != "signs":
            raise ValueError(
                "gradients='factored' is exact for projections of equal magnitudes alone: leave projection at 'signs', "
                f"got {self.projection!r}"
            )
        if self.is_factored and self.exact_only:
            raise ValueError(
                "exact_only never compresses, and gradients are factored where that is done: leave one of them out"
            )

    def _check_approximation(self) -> None:
        most: Any = self.max_approximation
        if (self.objective == "speed") != (most is not None):
            raise ValueError(
                f"objective='speed' goes with max_approximation, got objective={self.objective!r} and "
                f"max_approximation={most!r} (--objective, --max-approximation): it bounds the mean log2 of the "
                "sub-token size, so 5 allows 2**5 = 32 for all weights, or larger ones for some and none for others"
            )
        if most is None:
            return
        number = math.nan if isinstance(most, bool) or not isinstance(most, Real) else _as_float(most)
        if not 0 < number < math.inf:
            raise ValueError(
                f"max_approximation must be a positive number such as 5, got {most!r} (--max-approximation)"
            )
        object.__setattr__(self, "max_approximation", number)
        if self.exact_only:
            raise ValueError(
                "exact_only never compresses, and objective='speed' does nothing else: leave one of them out "
                "(--exact-only, --objective speed)"
            )


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
    if isinstance(budget_gb, bool) or not isinstance(budget_gb, Real):
        raise ValueError(f'budget_gb must be a number of GiB or "device", got {budget_gb!r}')
    size = _as_float(budget_gb) * GIB
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


def _capacity_bytes(device: torch.device) -> int | None:
    """All memory of a CUDA device, None where it is not at hand."""
    if device.type != "cuda" or (device.index or 0) >= torch.cuda.device_count():
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


def planning_device(model: torch.nn.Module, options: Options) -> torch.device:
    """The device that is planned for: the one asked for, else the model's own (CPU for a meta model)."""
    if options.device is not None:
        return torch.device(options.device)
    first = next(model.parameters(), None)
    if first is None or first.device.type not in ("cpu", "cuda"):
        return torch.device("cpu")
    return first.device
