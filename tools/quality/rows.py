"""The rows of tools/quality: what was asked for, and what was found."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tools.quality.ways import Shape, Task, Way

ASKED = ("task", "way", "device", "corpus", "seed", "rate", "steps", "equal_time")


@dataclass(frozen=True)
class Row:
    """One training run, with its figures or the reason why there are none.

    `corpus` is the hash of the text. With `equal_time` the run has as many `steps` as fit into the time of the dense
    run. `curve` has (steps, validation loss) on the way, `loss` is that of the end, NaN where training diverged.
    `step_seconds` is the median, `peak_bytes` that of one step, of tensors.
    """

    task_name: str
    task: Task
    name: str
    way: Way
    device: str
    corpus: str
    seed: int
    rate: float
    steps: int
    equal_time: bool = False
    loss: float | None = None
    curve: tuple[tuple[int, float], ...] = ()
    step_seconds: float = 0.0
    peak_bytes: int = 0
    num_compressed: int = 0
    num_weights: int = 0
    seconds: float = 0.0
    error: str | None = None

    def __str__(self) -> str:
        return f"{self.task_name}, {self.name}, seed {self.seed}, rate {self.rate:g}, {self.steps} steps"

    @property
    def key(self) -> str:
        """What tells a run from others. The names and the rates and steps that a task offers do not count, nor do the
        steps of a run of equal time, which depend on the machine."""
        asked = {name: getattr(self, name) for name in ASKED if name not in ("task", "way")}
        if self.equal_time:
            del asked["steps"]
        task = asdict(self.task)
        del task["rates"], task["steps"]
        return json.dumps([task, asdict(self.way), asked], sort_keys=True)


def read_rows(file: Path) -> list[Row]:
    """The rows of a file that have figures, the last of each key; none where there is no file."""
    if not file.is_file():
        return []
    rows = [_row(json.loads(line)) for line in file.read_text().splitlines()]
    return list({row.key: row for row in rows if row.error is None}.values())


def _row(data: dict[str, Any]) -> Row:
    known = {name: data[name] for name in (each.name for each in fields(Row)) if name in data}
    task = {**data["task"], "shape": Shape(**data["task"]["shape"]), "rates": tuple(data["task"]["rates"])}
    way = {**data["way"], "frozen": tuple(data["way"]["frozen"])}
    curve = tuple((int(step), float(loss)) for step, loss in data["curve"])
    return Row(**{**known, "task": Task(**task), "way": Way(**way), "curve": curve})


def those_left(asked: Iterable[Row], done: Iterable[Row]) -> list[Row]:
    """The rows that are not done yet."""
    keys = {row.key for row in done}
    return [row for row in asked if row.key not in keys]
