"""The price of a sub-token by its size, from rows: how much longer one must train to make up for what it costs.

Of losses it knows only differences from dense, each way at its own best rate. A difference of loss becomes time by the
slope of dense training: the loss of dense runs of two lengths, over the logarithm of the lengths. If a size costs d
and the slope is s for each e-fold of steps, exp(d / s) - 1 more steps make up for it; that share of the step's time is
its price.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tools.quality.rows import Row
from tools.quality.table import Group, Result, grouped, mean_and_spread, results
from tools.quality.ways import SIZES

KINDS = {"attention": "attention input", "mlp-input": "MLP input", "down": "down input"}
# Where nothing was lost, a price that only makes the smaller of two sizes the better one.
LEAST_SHARE = {2: 0.0033, 4: 0.0067, 8: 0.01, 16: 0.0133, 32: 0.0167}
# The planner is for wide models. An earlier run of one 512 wide lost nothing with sub-tokens of 8 (docs/quality.md), so
# rows of narrower ones, in whose inputs there are fewer of them, do not make sizes up to 8 dearer.
WIDE, FREE_UP_TO = 512, 8
LEAST_SEEDS, NEEDED = 2, (8, 32)


@dataclass(frozen=True)
class Fit:
    """Prices by size, `shares` of the step's time, from one `group` of rows, of a model so wide.

    `over_dense` is the loss over that of dense, by size and seed, `by_kind` the same with one kind of layer compressed
    alone, as far as there are rows; `slope` is what dense training gains by e times as many steps, between `lengths`.
    """

    group: Group
    width: int
    lengths: tuple[int, int]
    slope: float
    over_dense: Mapping[int, Mapping[int, float]]
    by_kind: Mapping[str, Mapping[int, Mapping[int, float]]]
    shares: Mapping[int, float]


def fit(rows: Iterable[Row]) -> Fit:
    """The prices that the rows make: of the widest model that was trained densely and in the sizes 8 and 32 with enough
    seeds, and densely for two lengths. Raises ValueError where there is none."""
    found = {group: {r.name: r for r in results(members)} for group, members in grouped(rows).items()}
    usable = []
    for group, ways in found.items():
        lengths = [g for g, others in found.items() if g[:3] == group[:3] and g != group and "dense" in others]
        over_dense = _of_kind(ways, "")
        is_trained_anew = not any(row.task.model for row in ways["dense"].rows)
        if lengths and is_trained_anew and all(size in over_dense for size in NEEDED):
            width = ways["dense"].rows[0].task.shape.width
            usable.append((width, len(over_dense), group[3], group, max(lengths, key=lambda g: g[3])))
    if not usable:
        raise ValueError(
            f"a price needs rows of one task in the ways dense and signs-{', signs-'.join(map(str, NEEDED))} with "
            f"{LEAST_SEEDS} seeds each, and of dense with other --steps"
        )
    width, _, _, group, other = max(usable)
    slope = _slope(found[group]["dense"], found[other]["dense"])
    over_dense, *kinds = (_of_kind(found[group], kind) for kind in ("", *KINDS))
    by_kind = dict(zip(KINDS, kinds, strict=True))
    between = (min(group[3], other[3]), max(group[3], other[3]))
    return Fit(group, width, between, slope, over_dense, by_kind, shares(over_dense, slope, width))


def _slope(dense: Result, other: Result) -> float:
    """What dense training gains by e times as many steps, over the seeds that both have."""
    steps, other_steps = dense.rows[0].steps, other.rows[0].steps
    gained = [dense.losses[seed] - other.losses[seed] for seed in dense.losses if seed in other.losses]
    return statistics.fmean(gained) / math.log(other_steps / steps)


def price_of(differences: Iterable[float], slope: float) -> float:
    """The share by which training has to be longer to make up for these losses."""
    return math.exp(statistics.fmean(differences) / slope) - 1


def shares(over_dense: Mapping[int, Mapping[int, float]], slope: float, width: int) -> dict[int, float]:
    """The price of each size for the planner, above that of a smaller one, and not below the least."""
    prices = {1: 0.0}
    for size, differences in over_dense.items():
        is_free = width < WIDE and size <= FREE_UP_TO
        measured = 0.0 if is_free else price_of(differences.values(), slope)
        prices[size] = round(max(measured, LEAST_SHARE[size], prices[max(prices)] + 0.001), 4)
    return prices


def fit_text(fitted: Fit) -> str:
    """What was found, and the table."""
    task, device, corpus, steps = fitted.group
    lines = [
        f"fitted to {task} on {device}, {steps} steps, text {corpus}",
        f"dense gains {fitted.slope:.3f} of loss with e times as many steps ({fitted.lengths[0]} to "
        f"{fitted.lengths[1]})",
    ]
    if fitted.width < WIDE:
        lines.append(
            f"no rows of a model {WIDE} wide: by an earlier run of one, sizes up to {FREE_UP_TO} are priced as if they "
            "lost nothing"
        )
    for size, differences in fitted.over_dense.items():
        kinds = [
            f"{KINDS[kind]} {mean_and_spread(sizes[size].values(), '+.3f')}"
            for kind, sizes in fitted.by_kind.items()
            if size in sizes
        ]
        over = mean_and_spread(differences.values(), "+.3f")
        longer = price_of(differences.values(), fitted.slope)
        lines.append(
            f"M = {size}: {over} over dense, {longer:+.1%} of the steps; alone: {', '.join(kinds) or 'not measured'}"
        )
    apart = [size for size in fitted.over_dense if _differ([k[size] for k in fitted.by_kind.values() if size in k])]
    if apart:
        sizes = ", ".join(map(str, apart))
        lines.append(f"the kinds of layer differ beyond the spread at M = {sizes}: one price for all is an average")
    return "\n".join([*lines, shares_line(fitted)])


def _differ(kinds: Sequence[Mapping[int, float]]) -> bool:
    """True where all seeds of one kind are above all of another."""
    bounds = [(min(values.values()), max(values.values())) for values in kinds]
    return any(low > high for low, _ in bounds for _, high in bounds)


def shares_line(fitted: Fit) -> str:
    """The line of velora_fx/choose/price.py."""
    return f"SHARES = {{{', '.join(f'{size}: {share:g}' for size, share in fitted.shares.items())}}}"


def _of_kind(ways: Mapping[str, Result], kind: str) -> dict[int, Mapping[int, float]]:
    """The loss over dense by size and seed, with one kind of layer compressed or, for "", with all."""
    found = {size: ways.get(f"signs-{size}-{kind}".removesuffix("-")) for size in SIZES}
    return {
        size: result.over_dense
        for size, result in found.items()
        if result is not None and len(result.over_dense) >= LEAST_SEEDS
    }
