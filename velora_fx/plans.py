"""The plan: what is kept, what is compressed, and the memory of a step before and after."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from velora_fx.peaks import Curve, Group, Measured, Peak, compare_categories, compare_peaks

SCHEMA = 6
UNCOUNTED = "what kernels take while they run is not all counted"  # how a note of that begins


@dataclass(frozen=True)
class Decision:
    """What becomes of one saved tensor that only weight gradients need.

    `consumers` are the dotted names of the linears that save it; `bytes_before` and `bytes_after` what is held for
    backward without and with this decision; `update_bytes_before` and `update_bytes_after` what the gradients and the
    optimizer state of their weights take.
    """

    region: str
    tensor: str
    consumers: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    action: Literal["keep", "compress"]
    sub_token_size: int | None
    bytes_before: int
    bytes_after: int
    update_bytes_before: int = 0
    update_bytes_after: int = 0


@dataclass(frozen=True)
class Skipped:
    """A module whose weight is trained by a matrix product that is left as it is, and why."""

    module: str
    reason: str


@dataclass(frozen=True)
class Recomputed:
    """A block under gradient checkpointing: "pointwise" keeps the outputs of matrix products and attention, "all"
    keeps the block's inputs alone."""

    region: str
    recompute: Literal["pointwise", "all"]


@dataclass(frozen=True)
class Exact:
    """The best that is reached exactly, instead of by compression: whether it fits the budget, its peak and time.

    `means` is "untouched" where the step fits as it is, or "checkpointing" (`method="exact"` installs it). Its figures
    for a compiled step are estimates, within a few percent; `method="exact"` plans with the true ones.
    """

    means: Literal["checkpointing", "untouched"]
    fits: bool
    peak_bytes: int
    step_seconds: float


@dataclass(frozen=True)
class Input:
    """A tensor among the inputs that a plan holds for; larger ones may not fit."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class InEffect:
    """How many blocks that a plan compresses or recomputes, and how many of their eager calls in training, ran so since
    the model was optimised."""

    blocks: int
    all_blocks: int
    calls: int
    all_calls: int


@dataclass(frozen=True)
class Plan:
    """A plan for one training step of a model; print it for the report.

    `inputs` are those of the largest batch that it holds for. `budget_bytes` is what was asked for, None if nothing
    was. `baseline` and `planned` are the simulated peaks of the untouched and of the planned model, in bytes of tensors
    plus overhead; `measured` is the peak of a real step, once there was one, `in_effect` how many calls ran compressed,
    as `plan_of` finds it. `recomputed` names the blocks that recompute in backward; `exact` is the best that is done
    exactly in place of the compression, None where nothing is compressed, without a budget, and without blocks to
    recompute. `compiled` is True for a step of torch.compile(model), "blocks" for one in which each block is compiled
    by itself, `method` what was allowed, `autocast` the dtype of the autocast that was on, `torch_version` the PyTorch
    that it was made with. Step times are predicted for `rates`.
    """

    model: str
    compiled: bool | Literal["blocks"]
    device: str
    optimizer: str
    inputs: tuple[Input, ...]
    budget_bytes: int | None
    baseline: Peak
    planned: Peak
    decisions: tuple[Decision, ...]
    recomputed: tuple[Recomputed, ...]
    exact: Exact | None
    rates: str
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]
    projection: str
    seed: int
    method: str = "auto"
    gradients: str = "dense"
    objective: str = "memory"
    autocast: str | None = None
    torch_version: str = ""
    measured: Measured | None = None
    in_effect: InEffect | None = field(default=None, compare=False)

    @property
    def has_uncounted(self) -> bool:
        """True where a note says that kernels may take more than the plan says."""
        return any(note.startswith(UNCOUNTED) for note in self.notes)

    @property
    def fits(self) -> bool:
        """True if the planned peak is within the budget."""
        return self.budget_bytes is None or self.planned.peak_bytes <= self.budget_bytes

    @property
    def overhead_bytes(self) -> int:
        """What the device holds at the planned peak besides the tensors; `planned.overhead` has it by name."""
        return sum(self.planned.overhead.values())

    @property
    def is_factored(self) -> bool:
        """True if the gradients of compressed weights are factored."""
        return self.gradients == "factored"

    @property
    def compressed(self) -> tuple[Decision, ...]:
        """The decisions to compress."""
        return tuple(decision for decision in self.decisions if decision.action == "compress")

    @property
    def largest_sub_token(self) -> int | None:
        """The largest sub-token size in the plan, None where nothing is compressed."""
        return max((decision.sub_token_size or 0 for decision in self.compressed), default=None)

    def __str__(self) -> str:
        from velora_fx.report import render

        return render(self)

    def plot(self, path: str | Path) -> None:
        """Draws memory over the step, before and after, as a .svg, .png or .pdf file; needs matplotlib."""
        from velora_fx.report import plot

        plot(self, path)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, in the schema of `tools/plan.py --json`."""
        peaks = {name: replace(getattr(self, name), timeline=None) for name in ("baseline", "planned")}
        data = asdict(replace(self, **peaks))
        for name in peaks:
            del data[name]["timeline"]
        if self.measured is not None:
            pairs = compare_peaks(self.planned, self.measured) + compare_categories(self.planned, self.measured)
            data["comparison"] = [{**asdict(pair), "difference_percent": pair.difference_percent} for pair in pairs]
        return {"schema": SCHEMA, **data, "fits": self.fits}

    def to_json(self) -> str:
        """The plan as one JSON object; `from_json` reads it back."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`; raises ValueError for another schema."""
        if data.get("schema") != SCHEMA:
            raise ValueError(f"a plan of schema {SCHEMA} is needed, got schema {data.get('schema')!r}")
        fields = {name: value for name, value in data.items() if name not in ("schema", "fits", "comparison")}
        fields["inputs"] = tuple(Input(**{**item, "shape": tuple(item["shape"])}) for item in data["inputs"])
        fields["baseline"], fields["planned"] = _peak(data["baseline"]), _peak(data["planned"])
        fields["decisions"] = tuple(
            Decision(**{**item, "consumers": tuple(item["consumers"]), "shape": tuple(item["shape"])})
            for item in data["decisions"]
        )
        fields["recomputed"] = tuple(Recomputed(**item) for item in data["recomputed"])
        fields["exact"] = None if data["exact"] is None else Exact(**data["exact"])
        fields["skipped"] = tuple(Skipped(**item) for item in data["skipped"])
        fields["notes"] = tuple(data["notes"])
        fields["in_effect"] = None if data["in_effect"] is None else InEffect(**data["in_effect"])
        fields["measured"] = None if data["measured"] is None else _measured(data["measured"])
        return cls(**fields)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse of `to_json`; raises ValueError for text that is no plan."""
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError(f"a plan is one JSON object, got {type(data).__name__}")
        try:
            return cls.from_dict(data)
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is no whole plan: {type(error).__name__}: {error}") from error


def _peak(data: Mapping[str, Any]) -> Peak:
    curve = data.get("curve")
    if curve is not None:
        categories = {name: tuple(values) for name, values in curve["categories"].items()}
        curve = Curve(categories, tuple((start, moment) for start, moment in curve["moments"]))
    there = data.get("there")
    largest = tuple(Group(**group) for group in data.get("largest", ()))
    return Peak(**{**data, "curve": curve, "there": None if there is None else Group(**there), "largest": largest})


def _measured(data: Mapping[str, Any]) -> Measured:
    return Measured(**{**data, "inputs": {name: tuple(shape) for name, shape in data["inputs"].items()}})


class BudgetError(ValueError):
    """A budget that no plan meets; `smallest_peak_bytes` is the least reachable, `plan` the plan that reaches it."""

    def __init__(self, message: str, plan: Plan) -> None:
        super().__init__(message)
        self.plan = plan
        self.smallest_peak_bytes = plan.planned.peak_bytes

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.plan)
