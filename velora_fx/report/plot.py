"""Pictures of a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from velora_fx.names import UNITS, in_units
from velora_fx.peaks import Peak
from velora_fx.plans import Plan
from velora_fx.report.text import in_use, place_of, step_name

COLORS = ("#4c72b0", "#8c8c8c", "#c44e52", "#8172b3", "#dd8452", "#f0c05a")  # one for each category
LONGEST_PLACE = 54  # characters that fit beside a peak


def plot(plan: Plan, path: str | Path) -> None:
    """Draws memory over the step, stacked by category, untouched and planned side by side, with the budget as a line.

    The ending of the path tells the format: .svg, .png or .pdf. Raises ImportError without matplotlib, ValueError for
    another ending or a plan without curves.
    """
    figure_of_size = figure_class(path)
    sides = [("untouched", plan.baseline), ("planned", plan.planned)][: 2 if plan.compressed or plan.recomputed else 1]
    highest = max(peak.peak_bytes for _, peak in sides)
    unit, name = next((pair for pair in UNITS if highest >= pair[0]), (1, "B"))
    if plan.budget_bytes is not None and highest < plan.budget_bytes < 1.5 * highest:
        highest = plan.budget_bytes  # one far above would press the picture down: the legend has its number
    figure = figure_of_size(figsize=(5.2 * len(sides) + 1.6, 4.4), layout="constrained")
    panels: Any = figure.subplots(1, len(sides), sharey=True, squeeze=False)[0]
    for axes, (title, peak) in zip(panels, sides, strict=True):
        _draw(axes, peak, unit)
        axes.set_title(f"{title}: peak {in_units(peak.peak_bytes)}", fontsize=10)
        axes.set_ylim(0, 1.25 * highest / unit)
        if plan.budget_bytes is not None:
            above = "" if plan.budget_bytes < 1.25 * highest else ",\nfar above"
            label = f"budget\n{in_units(plan.budget_bytes)}{above}"
            axes.axhline(plan.budget_bytes / unit, color="black", linestyle="--", linewidth=1, label=label)
    panels[0].set_ylabel(f"memory in use, {name}")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(
        f"{plan.model}: one training step, {step_name(plan)} on {plan.device}, {plan.optimizer}",
        x=0.02,
        ha="left",
        fontsize=11,
    )
    figure.savefig(path, dpi=150)


def figure_class(path: str | Path) -> Any:
    """matplotlib's figures, once the ending of the path is known to be one that they are written as."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "velora-fx[plot]"') from error
    if Path(path).suffix not in (".svg", ".png", ".pdf"):
        raise ValueError(f"a plot is a .svg, .png or .pdf file, got {str(path)!r}")
    return Figure


def _draw(axes: Any, peak: Peak, unit: int) -> None:
    if peak.curve is None:
        raise ValueError("the plan has no curves: it was written by another version; make it again")
    bands = [*peak.curve.categories.items()]
    if peak.overhead:
        bands.insert(0, ("overhead", (sum(peak.overhead.values()),) * len(bands[0][1])))
    bands = [(name, values) for name, values in bands if max(values)]
    colors = dict(zip(("overhead", *peak.curve.categories), ("#d9d9d9", *COLORS), strict=True))
    axes.stackplot(
        range(len(bands[0][1])),
        [[value / unit for value in values] for _, values in bands],
        labels=[name for name, _ in bands],
        colors=[colors[name] for name, _ in bands],
        step="post",
        linewidth=0,
    )
    ends = [start for start, _ in peak.curve.moments[1:]] + [len(bands[0][1]) - 1]
    axes.set_xticks([(start + end) / 2 for (start, _), end in zip(peak.curve.moments, ends, strict=True)])
    axes.set_xticklabels([moment.replace("optimizer step", "optimizer\nstep") for _, moment in peak.curve.moments])
    axes.tick_params(axis="x", length=0)
    for start, _ in peak.curve.moments[1:]:
        axes.axvline(start, color="black", linewidth=0.5, alpha=0.5)
    axes.set_xlim(0, len(bands[0][1]) - 1)
    axes.set_xlabel("allocations and frees, in order")
    totals = [sum(values) for values in zip(*(values for _, values in bands), strict=True)]
    _mark(axes, peak, totals.index(max(totals)), len(totals), unit)


def _mark(axes: Any, peak: Peak, at: int, num_points: int, unit: int) -> None:
    """Marks the peak, with where in the step it is and what that place holds, to the side that has room."""
    place = place_of(peak)
    if len(place) > LONGEST_PLACE:
        place = f"{place.partition(' of ')[0]} of ...{place[-LONGEST_PLACE + 20 :]}"
    side, shift = (("left", 6), ("center", 0), ("right", -6))[3 * at // num_points]
    axes.annotate(
        f"{place}\n{in_use(peak.there)}" if peak.there else place,
        (at, peak.peak_bytes / unit),
        xytext=(shift, 10),
        textcoords="offset points",
        ha=side,
        va="bottom",
        fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8},
    )
    axes.plot(
        at, peak.peak_bytes / unit, marker=7, markersize=6, color="black", clip_on=False
    )  # a caret that points down
