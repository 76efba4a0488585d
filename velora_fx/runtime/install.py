"""Puts regions into a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from velora_fx.capture import RegionGraph
from velora_fx.ops import sign_projection
from velora_fx.passes.swap import Choice
from velora_fx.runtime.carriers import add_carriers
from velora_fx.runtime.factored_region import FactoredRegion
from velora_fx.runtime.factored_step import Folding
from velora_fx.runtime.notices import Notices
from velora_fx.runtime.region import Region, rewritten


@dataclass(frozen=True)
class RegionPlan:
    """What to install on one region: its prepared graphs, the choice for each consumer, and each tensor's width."""

    graphs: tuple[RegionGraph, ...]
    choices: Mapping[str, Choice]
    widths: Mapping[str, int]


def install(model: torch.nn.Module, plans: Mapping[str, RegionPlan], seed: int, notices: Notices) -> list[Region]:
    """Installs the regions, with the carriers of their weights; those with the same graphs and choices share their
    rewritten graphs."""
    shared: dict[tuple[object, ...], list[RegionGraph]] = {}
    regions, folding = [], Folding()
    for name, own in plans.items():
        block = model.get_submodule(name)
        key = (*(id(graph) for graph in own.graphs), *own.choices.items())
        if key not in shared:
            shared[key] = [rewritten(graph, own.choices) for graph in own.graphs]
        dtype = torch.promote_types(torch.float32, next(block.parameters()).dtype)
        projections = {
            choice.tensor: sign_projection(
                seed, name, choice.tensor, own.widths[choice.tensor] // choice.sub_token_size, choice.sub_token_size,
                dtype,
            )
            for choice in own.choices.values()
        }  # fmt: skip
        parts = name, block, own.choices, projections, shared[key], notices
        region: Region
        if any(choice.carrier for choice in own.choices.values()):
            region = FactoredRegion(*parts, listener=folding)
            add_carriers(region)
        else:
            region = Region(*parts)
        region.install()
        regions.append(region)
    return regions
