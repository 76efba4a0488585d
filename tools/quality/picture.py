"""One picture of the rows: loss over training, and loss over dense by sub-token size."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.quality.rows import Row
from tools.quality.table import Group, Result, grouped, results
from tools.quality.ways import SIZES

CURVES = ("dense", "signs-2", "signs-8", "signs-32", "mean-8-v+down")
KINDS = {"": "all", "-attention": "attention input", "-mlp-input": "MLP input", "-down": "down input"}


def draw(rows: Sequence[Row], group: Group, path: Path) -> None:
    """Draws the ways of one group; needs matplotlib."""
    from matplotlib.figure import Figure  # not installed everywhere

    found = {result.name: result for result in results(grouped(rows)[group])}
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in CURVES:
        if name in found:
            curves = [row.curve for row in found[name].rows]
            steps = [step for step, _ in curves[0]]
            left.plot(steps, [statistics.fmean(c[n][1] for c in curves) for n in range(len(steps))], label=name)
    left.set(xlabel="steps", ylabel="validation loss", title="mean over seeds, each at its best rate")
    left.legend(frameon=False)
    for ending, label in KINDS.items():
        _draw_sizes(right, {size: found.get(f"signs-{size}{ending}") for size in SIZES}, label)
    right.axhline(0, color="black", linewidth=0.8)
    right.set_xscale("log", base=2)
    right.set_xticks(SIZES, [str(size) for size in SIZES])
    right.set(xlabel="sub-token size M, signs", ylabel="validation loss over dense")
    right.set_title("mean, least and largest of seeds")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def _draw_sizes(axes: Any, by_size: dict[int, Result | None], label: str) -> None:
    found = {size: list(result.over_dense.values()) for size, result in by_size.items() if result is not None}
    found = {size: values for size, values in found.items() if values}
    if found:
        means = [statistics.fmean(values) for values in found.values()]
        below = [mean - min(values) for mean, values in zip(means, found.values(), strict=True)]
        above = [max(values) - mean for mean, values in zip(means, found.values(), strict=True)]
        axes.errorbar(list(found), means, (below, above), marker="o", capsize=3, label=label)
