"""Captures what compiled code will need, before it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from velora_fx.capture import describe_leaf, find_graph, flatten, key_of
from velora_fx.runtime import ModelHook, Region, StandIn, hooks_in, make_call, uninstall, unwatch
from velora_fx.simulate import FiniteValues, as_compiled, fake_copy, fake_mode, kernels_of

MAX_KINDS = 16  # an argument that is another number in each step would be rehearsed in each


class CaptureAhead(ModelHook):
    """Before a call of a new kind of a model that is planned for torch.compile it captures the graphs that the regions
    lack for it, which they cannot while Dynamo traces them."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self.regions = tuple(regions)
        self.known: set[tuple[Any, ...]] = set()

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            self.look(module, args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def look(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Captures what is lacking if the call is new."""
        alike = {id(region.graphs): region for region in self.regions}.values()
        kind = (*_kind_of(args, kwargs), *(key_of(make_call(region.block, (), {}))[2:5] for region in alike))
        is_full = len(self.known) >= MAX_KINDS
        if (kind in self.known or is_full) and not any(map(_is_changed, alike)):
            return
        self.known.add(kind)
        for is_traced in (True, False):
            with contextlib.suppress(Exception):  # what cannot run without values is said where it lacks a graph
                _rehearse(model, self.regions, args, kwargs, is_traced)


def _kind_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What a call's arguments are but for sizes, of which only 1 is another kind."""
    structure, leaves = flatten((args, kwargs))
    sizes = [tuple(size == 1 for size in leaf.shape) for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return structure, tuple(map(describe_leaf, leaves)), tuple(sizes)


def _is_changed(region: Region) -> bool:
    """True if attributes of the block are such as there is no graph for."""
    return not any(
        all(attribute.is_same(region.block, exact=False) for attribute in graph.attributes) for graph in region.graphs
    )


def _rehearse(
    model: torch.nn.Module, regions: Sequence[Region], args: tuple[Any, ...], kwargs: dict[str, Any], is_traced: bool
) -> None:
    """Runs the forward without values, as it is traced or as it runs around compiled blocks, and captures."""
    mode = fake_mode()
    fake = fake_copy(model, mode, None, "none" if is_traced else "integers")
    uninstall(fake)
    unwatch(fake)
    for region in regions:
        if region.previous is None:
            _Capturing(region, fake.get_submodule(region.name)).install()
    device = next(model.parameters()).device
    fake_args, fake_kwargs = fake_copy((args, kwargs), mode, None, "none" if is_traced else "all")
    traced = as_compiled() if is_traced else contextlib.nullcontext()
    with torch.random.fork_rng(devices=[]), kernels_of(device), FiniteValues(), traced:
        fake(*fake_args, **fake_kwargs)


class _Capturing(StandIn):
    """Stands in for the forward of a region's copy, for which the region gets the graphs that it lacks."""

    def __init__(self, region: Region, block: torch.nn.Module) -> None:
        super().__init__(block)
        self.region = region

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if hooks_in(self.block) is None:
            call = make_call(self.block, args, kwargs)
            key = key_of(call)
            if find_graph(self.region.graphs, call, key, exact=False) is None:
                self.region.capture(call, key)
        return self.original(*args, **kwargs)
