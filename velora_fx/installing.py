"""Puts regions into a model and takes them out again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from velora_fx.candidates import Candidate, full_name
from velora_fx.carriers import add_carriers
from velora_fx.folding import Folding
from velora_fx.graphs import RegionGraph
from velora_fx.notices import Notices
from velora_fx.passes.swap import Carrier, Choice
from velora_fx.probe import Findings, Use
from velora_fx.projection import sign_projection
from velora_fx.region import Region, rewritten


@dataclass(frozen=True)
class RegionPlan:
    """What to install on one region: its prepared graphs, the choice for each consumer, and each tensor's width."""

    graphs: tuple[RegionGraph, ...]
    choices: Mapping[str, Choice]
    widths: Mapping[str, int]


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


def install(
    model: torch.nn.Module, plans: Mapping[str, RegionPlan], seed: int, target: str | None = None
) -> list[Region]:
    """Installs the regions, with the carriers of their weights; those with the same graphs and choices share their
    rewritten graphs. `target` is what was planned for, None where it does not matter."""
    shared: dict[tuple[object, ...], list[RegionGraph]] = {}
    regions, folding, notices = [], Folding(), Notices(target)
    for name, plan in plans.items():
        block = model.get_submodule(name)
        key = (*(id(graph) for graph in plan.graphs), *plan.choices.items())
        if key not in shared:
            shared[key] = [rewritten(graph, plan.choices) for graph in plan.graphs]
        dtype = torch.promote_types(torch.float32, next(block.parameters()).dtype)
        projections = {
            choice.tensor: sign_projection(
                seed, name, choice.tensor, plan.widths[choice.tensor] // choice.sub_token_size, choice.sub_token_size,
                dtype,
            )
            for choice in plan.choices.values()
        }  # fmt: skip
        region = Region(name, block, plan.choices, projections, shared[key], notices)
        if region.carriers:
            add_carriers(region)
            region.folding = folding
        region.install()
        regions.append(region)
    return regions
