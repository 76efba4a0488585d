"""A region of a model: stands in for the forward of a module and runs its rewritten graph."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from velora_fx.capture import (
    Call,
    LiveBlock,
    RegionGraph,
    Seen,
    autocast_depth,
    differences,
    find_graph,
    flatten,
    is_cache,
    key_of,
    make_graph,
    state_of,
    with_frozen,
    without_empty_caches,
)
from velora_fx.ops.velora import is_followed
from velora_fx.passes import run
from velora_fx.passes.find_products import find_products
from velora_fx.passes.swap import Choice, swap
from velora_fx.runtime.inner_hooks import inside_torch_func, why_no_graph
from velora_fx.runtime.notices import Notices
from velora_fx.runtime.stand_in import StandIn

MAX_GRAPHS = 8
NEW = "it is called in a new way"
CHECKPOINTED = "it is recomputed in backward (gradient checkpointing), so nothing is kept for it"


class Region(StandIn):
    """The forward of a block that runs rewritten graphs.

    In training it runs the rewritten graph that stands for the call; in `eval()`, under `no_grad`, under
    `torch.func`, with hooks on inner modules, with gradient checkpointing in the block's own forward or with a filled
    cache it calls the original forward. A call that no graph stands for is captured anew, up to MAX_GRAPHS graphs.
    Equal regions share `graphs`, all of a model `notices`; `projections` are CPU tensors, a copy of which follows the
    inputs to their device.
    """

    carriers: tuple[str, ...] = ()

    def __init__(
        self,
        name: str,
        block: torch.nn.Module,
        choices: Mapping[str, Choice],
        projections: Mapping[str, torch.Tensor],
        graphs: list[RegionGraph],
        notices: Notices,
    ) -> None:
        super().__init__(block)
        self.name = name
        self.choices = dict(choices)
        self.projections = dict(projections)
        self.placed = list(projections.values())
        self.graphs = graphs
        self.notices = notices
        self.live = LiveBlock(block)
        self.num_calls = self.num_in_effect = 0  # of calls in training that no compiler traced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.removed or not torch.is_grad_enabled() or self.is_exempt():
            return self.original(*args, **kwargs)
        self.notices.check_target(self)
        self.prepare()
        seen = None if torch.compiler.is_compiling() else self.live.look()
        if seen is not None:
            self.num_calls += 1
        reason = why_no_graph(self.block, seen)
        if reason is not None:
            self.fall_back(reason)
            return self.original(*args, **kwargs)
        call = make_call(self.block, args, kwargs, seen)
        key = key_of(call) if seen is None else key_of(call, seen.key)
        graph = self.graph_for(call, key)
        if graph is None or graph.gm is None:
            self.fall_back(NEW if graph is None else graph.reason, key if graph is None else None)
            return self.original(*args, **kwargs)
        result = graph.result(graph.recomputed(partial(run_graph, graph), call, self.extra(call, seen)))
        if seen is not None:
            self.num_in_effect += 1
        return result

    def is_exempt(self) -> bool:
        """True for a call that runs the original forward as a matter of course."""
        return not self.block.training or inside_torch_func()

    def prepare(self) -> None:
        """What comes before a call is looked at."""

    def fall_back(self, reason: str | None, key: tuple[Any, ...] | None = None) -> None:
        """Says why the original forward runs; `key` is that of a call that no graph stands for."""
        if torch.compiler.is_compiling():
            from torch._dynamo.comptime import comptime

            comptime(_tell_traced)
        else:
            self.tell(reason, key)

    def tell(self, reason: str | None, key: tuple[Any, ...] | None, is_traced: bool = False) -> None:
        """Warns that the original forward runs."""
        if key is not None and is_traced:
            self.notices.say(
                self.name,
                f"is compiled for a call unlike those that were planned for ({self.what_differs(key)}) and runs its "
                "original forward, exactly: plan with example_inputs like it",
            )
        elif key is not None:
            self.notices.say(
                self.name,
                f"was called in more than {MAX_GRAPHS} different ways and runs its original forward for new ones",
                f", such as this one ({self.what_differs(key)})",
            )
        else:
            self.notices.say(self.name, f"runs its original forward, exactly: {reason}")

    def what_differs(self, key: tuple[Any, ...]) -> str:
        """In what a call differs from those that there are graphs for."""
        alike = next((graph for graph in self.graphs if graph.key == key), None)
        if alike is None:
            return differences(key, [graph.key for graph in self.graphs])
        changed = (attribute for attribute in alike.attributes if not attribute.is_same(self.block, exact=False))
        return "; ".join(attribute.changed_in(self.block) for attribute in changed) or "a size differs"

    def extra(self, call: Call, seen: Seen | None) -> list[torch.Tensor]:
        """What a graph is given after the call's tensors: the projections."""
        return self.placed_on(call.tensors[0].device)

    def graph_for(self, call: Call, key: tuple[Any, ...]) -> RegionGraph | None:
        """The graph that stands for the call of this key; captured now if there is none and room for one more."""
        graph = find_graph(self.graphs, call, key, exact=False)
        if graph is None and not torch.compiler.is_compiling():
            graph = self.capture(call, key)
        return graph

    def capture(self, call: Call, key: tuple[Any, ...]) -> RegionGraph | None:
        """A new graph for the call, if there is room for one more."""
        if len(self.graphs) >= MAX_GRAPHS:
            return None
        graph = rewritten(make_graph(call, key, self.previous), self.choices)
        self.graphs.append(graph)
        return graph

    def set_projection(self, tensor: str, v: torch.Tensor) -> None:
        """Replaces the projection of a tensor; raises ValueError for another shape."""
        if v.shape != self.projections[tensor].shape:
            raise ValueError(
                f"the projection of {self.name}.{tensor} has shape {tuple(self.projections[tensor].shape)}, "
                f"got {tuple(v.shape)}"
            )
        self.projections[tensor] = v.detach().to("cpu", copy=True)
        self.placed = list(self.projections.values())

    def placed_on(self, device: torch.device) -> list[torch.Tensor]:
        """The projections on a device; they stay there until another one is asked for."""
        if self.placed[0].device == device:
            return self.placed
        moved = [v.to(device) for v in self.projections.values()]
        if not torch.compiler.is_compiling():
            self.placed = moved
        return moved


def _tell_traced(context: Any) -> None:
    """Runs while Dynamo traces `Region.fall_back`, with its locals: an ordinary warning would not be seen there."""
    region = context.get_local("self")._i_will_not_complain_if_bc_breaks_VariableTracker().value
    region.tell(*(context.get_local(name).as_python_constant() for name in ("reason", "key")), is_traced=True)


def make_call(block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seen: Seen | None = None) -> Call:
    """A call of a block as regions see it: empty caches are None. `seen` is the block, if it was looked at."""
    structure, leaves = flatten((args, kwargs))
    if any([is_cache(leaf) for leaf in leaves]):
        args, kwargs = without_empty_caches(args, kwargs, _layer_of(block))
        structure, leaves = flatten((args, kwargs))
    return Call(block, args, kwargs, structure, leaves, state_of(block) if seen is None else seen.state)


def _layer_of(block: torch.nn.Module) -> int:
    """The block's slot in a cache, as Hugging Face models number them."""
    numbers = (vars(child).get("layer_idx") for child in block.modules())
    return next((number for number in numbers if isinstance(number, int)), 0)


def rewritten(graph: RegionGraph, choices: Mapping[str, Choice]) -> RegionGraph:
    """A copy of a prepared graph with the choices put in; without `gm` if none of them applies to it."""
    if graph.captured is None or graph.gm is None:
        return graph
    carried = {choice.carrier.parameter for choice in choices.values() if choice.carrier}
    if graph.checkpoint is not None and not carried:
        return RegionGraph(graph.key, graph.attributes, None, CHECKPOINTED)
    key = with_frozen(graph.key, carried)
    trainable = {name for name, *_, requires_grad in graph.key[3] if requires_grad} | carried
    products = [product for product in find_products(graph.gm) if product.parameter in trainable]
    if not any(product.consumer in choices for product in products):
        return RegionGraph(key, graph.attributes, None, "none of the weights that the plan compresses is trained")
    gm = copy.deepcopy(graph.gm)
    run(gm, [partial(swap, choices=choices)])
    return RegionGraph(key, graph.attributes, replace(graph.captured, gm=gm))


def run_graph(graph: RegionGraph, inputs: list[torch.Tensor]) -> Any:
    """Runs a region's graph; an error, as of a checkpoint that has recomputed enough, leaves grad mode and autocast."""
    assert graph.gm is not None
    if torch.compiler.is_compiling():
        return graph.gm(*inputs)
    depth, has_gradients = autocast_depth(), torch.is_grad_enabled()
    try:
        return graph.gm(*inputs) if is_followed(*inputs) else graph.eager(*inputs)
    except BaseException:
        torch._C._set_grad_enabled(has_gradients)
        _leave_stretches(graph.key, depth)
        raise


def _leave_stretches(key: tuple[Any, ...], depth: int) -> None:
    """Sets autocast to what it was at the call: an error may have been raised in a stretch."""
    for kind, enabled, dtype in key[4]:
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)
    while autocast_depth() > depth:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
