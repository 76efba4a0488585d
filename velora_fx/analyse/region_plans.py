"""What to install on each region for the sub-token sizes that were chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from velora_fx.analyse.candidates import Candidate, full_name
from velora_fx.analyse.probe import Findings, Use
from velora_fx.passes.swap import Carrier, Choice
from velora_fx.runtime import RegionPlan


def region_plans(
    findings: Findings, candidates: Iterable[Candidate], sizes: Mapping[tuple[str, str], int], is_factored: bool
) -> dict[str, RegionPlan]:
    """The regions to install where `sizes` gives the sub-token size of each compressed candidate by its key.

    With `is_factored` the weights get carriers.
    """
    choices: dict[str, dict[str, Choice]] = {}
    widths: dict[str, dict[str, int]] = {}
    for candidate in candidates:
        size = sizes.get(candidate.key)
        if size is None:
            continue
        for saving in candidate.savings:
            own = next(s for s in candidate.savings if (s.region, s.x) == (saving.region, saving.x))
            tensor = full_name(own.consumer or "", "input")
            assert saving.consumer is not None
            carrier = _carrier(findings.uses[saving.region, saving.consumer]) if is_factored else None
            choices.setdefault(saving.region, {})[saving.consumer] = Choice(tensor, size, carrier)
            widths.setdefault(saving.region, {})[tensor] = saving.shape[-1]
    return {
        name: RegionPlan(tuple(findings.graphs[name]), choices[name], widths[name])
        for name in findings.graphs
        if name in choices
    }


def _carrier(use: Use) -> Carrier:
    assert use.input_dim is not None
    return Carrier(use.parameter, use.input_dim)
