"""What to install on each region for the inputs of linears that are to be compressed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch.fx import Node

from velora_fx.analyse.trial import Findings, Use, full_name
from velora_fx.ops import without_wrappers
from velora_fx.passes.find_products import Product, find_products
from velora_fx.passes.swap import Carrier, Choice
from velora_fx.runtime import RegionPlan


def region_plans(
    findings: Findings, compressed: Iterable[tuple[Sequence[str], int]], is_factored: bool
) -> dict[str, RegionPlan]:
    """The regions to install for pairs of the linears that keep one input, by their dotted names, and its sub-token
    size; with `is_factored` their weights get carriers.

    Linears of a region that read the same tensor share its projections. Raises ValueError for a linear that no region
    has, or whose input the size does not divide.
    """
    keys = {without_wrappers(full_name(*key)): key for key in findings.uses}
    products = {name: products_of(findings, name) for name in dict.fromkeys(region for region, _ in keys.values())}
    choices: dict[str, dict[str, Choice]] = {}
    widths: dict[str, dict[str, int]] = {}
    for names, size in compressed:
        tensors: dict[tuple[str, Node], str] = {}
        for name in names:
            key = keys.get(without_wrappers(name))
            product = products[key[0]].get(key[1]) if key is not None else None
            if key is None or product is None:
                raise ValueError(f"the plan compresses the input of {name}, {_why_not(findings, name)}")
            region, consumer = key
            x, width = product.node.args[0], width_of(product)
            assert isinstance(x, Node)
            if width % size:
                raise ValueError(f"the plan's sub-token size {size} does not divide the input width {width} of {name}")
            tensor = tensors.setdefault((region, x), full_name(consumer, "input"))
            carrier = _carrier(findings.uses[key]) if is_factored else None
            choices.setdefault(region, {})[consumer] = Choice(tensor, size, carrier)
            widths.setdefault(region, {})[tensor] = width
    return {
        name: RegionPlan(tuple(findings.graphs[name]), choices[name], widths[name])
        for name in findings.graphs
        if name in choices
    }


def width_of(product: Product) -> int:
    """The width of a linear's input: that of its weight."""
    weight = product.node.args[1]
    assert isinstance(weight, Node)
    if "val" in weight.meta:
        return int(weight.meta["val"].shape[-1])
    (stored,) = weight.all_input_nodes  # [D, O], whose transpose the graph was given
    return int(stored.meta["val"].shape[0])


def products_of(findings: Findings, region: str) -> Mapping[str, Product]:
    """The products of a region that can be compressed, by consumer."""
    graphs = [graph.gm for graph in findings.graphs.get(region, ()) if graph.gm is not None]
    return {p.consumer: p for gm in graphs for p in find_products(gm) if p.reason is None}


def _why_not(findings: Findings, name: str) -> str:
    """Why the input of a linear of this name cannot be compressed here."""
    use = next((u for u in findings.uses.values() if without_wrappers(full_name(u.region, u.consumer)) == name), None)
    if use is not None and use.reason:
        return f"and here {use.reason}: make the plan with this model"
    inside = [region for region in findings.failures if not region or f"{name}.".startswith(f"{region}.")]
    if inside:
        return f"which could not be captured here: {findings.failures[inside[-1]]}"
    return "which this model does not train by a linear layer: make the plan with this model and these inputs"


def _carrier(use: Use) -> Carrier:
    assert use.input_dim is not None
    return Carrier(use.parameter, use.input_dim)
