"""A region of a model: stands in for the forward of a module and runs its rewritten graph."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch

from velora_fx.capture import (
    Call,
    RegionGraph,
    autocast_depth,
    carriers_of,
    differences,
    find_graph,
    flatten,
    key_of,
    make_graph,
    state_of,
    with_frozen,
    without_empty_caches,
)
from velora_fx.passes import run
from velora_fx.passes.find_products import find_products
from velora_fx.passes.swap import CARRIER, Carrier, Choice, swap
from velora_fx.runtime.notices import Notices
from velora_fx.runtime.stand_in import StandIn

MAX_GRAPHS = 8
NEW = "it is called in a new way"
CHECKPOINTED = "it is recomputed in backward (gradient checkpointing), so nothing is kept for it"


class StepListener(Protocol):
    """What is told of the regions whose weights an optimizer steps by their carriers."""

    def add(self, region: Region) -> None:
        """The region has been put into its model."""

    def discard(self, region: Region) -> None:
        """The region has been taken out of its model."""


class Region(StandIn):
    """The forward of a block that runs rewritten graphs.

    In training it runs the rewritten graph that stands for the call; in `eval()`, under `no_grad`, under
    `torch.func`, with hooks on inner modules, with gradient checkpointing in the block's own forward or with a filled
    cache it calls the original forward. Weights with carriers get a gradient from the graph alone: their region runs it
    in `eval()` too, and inside of the checkpoint under gradient checkpointing, and in the other cases raises. A call
    that no graph stands for is captured anew, up to MAX_GRAPHS graphs. Equal regions share `graphs`, all of a model
    `notices`; `projections` are CPU tensors, a copy of which follows the inputs to their device.
    """

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
        self.placed = dict(projections)
        chosen = [choice for choice in self.choices.values() if choice.carrier]
        self.carriers = tuple(dict.fromkeys(choice.carrier.name for choice in chosen if choice.carrier))
        self.graphs = graphs
        self.listener: StepListener | None = None
        self.notices = notices

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's weights are stepped as the original's are."""
        vars(self).update(state)
        if self.listener is not None and not self.removed:
            self.listener.add(self)

    def install(self) -> None:
        """Makes this the forward of the block, whose carriers, if it has any, are in place."""
        super().install()
        if self.listener is not None:
            self.listener.add(self)

    def remove(self) -> None:
        """Gives the block its own forward back."""
        super().remove()
        if self.listener is not None:
            self.listener.discard(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.removed or not torch.is_grad_enabled():
            return self.original(*args, **kwargs)
        if not self.carriers and (not self.block.training or _inside_torch_func()):
            return self.original(*args, **kwargs)
        self.notices.check_target(self)
        reason = "it is called inside of torch.func" if _inside_torch_func() else hooks_in(self.block)
        if reason is not None:
            self.fall_back(reason)
            return self.original(*args, **kwargs)
        if self.carriers and not torch.compiler.is_compiling():
            self.freeze()
        call = make_call(self.block, args, kwargs)
        graph = self.graph_for(call)
        if graph is None or graph.gm is None:
            self.fall_back(NEW if graph is None else graph.reason, key_of(call) if graph is None else None)
            return self.original(*args, **kwargs)
        return graph.result(graph.recomputed(partial(run_graph, graph), call, self.extra(call)))

    def fall_back(self, reason: str | None, key: tuple[Any, ...] | None = None) -> None:
        """Says why the original forward runs; RuntimeError where that would leave weights untrained.

        `key` is that of a call that no graph stands for.
        """
        if torch.compiler.is_compiling():
            from torch._dynamo.comptime import comptime

            comptime(_tell_traced)
        elif not self.carriers:
            self.tell(reason, key)
        else:
            reason = reason if key is None else f"{reason} ({self.differences(key)})"
        self.check_needless(reason)

    def tell(self, reason: str | None, key: tuple[Any, ...] | None, is_traced: bool = False) -> None:
        """Warns that the original forward runs."""
        if key is not None and is_traced:
            self.notices.say(
                self.name,
                f"is compiled for a call unlike those that were planned for ({self.differences(key)}) and runs its "
                "original forward, exactly: plan with example_inputs like it",
            )
        elif key is not None:
            self.notices.say(
                self.name,
                f"was called in more than {MAX_GRAPHS} different ways and runs its original forward for new ones",
                f", such as this one ({self.differences(key)})",
            )
        else:
            self.notices.say(self.name, f"runs its original forward, exactly: {reason}")

    def differences(self, key: tuple[Any, ...]) -> str:
        """In what a call differs from those that there are graphs for."""
        alike = next((graph for graph in self.graphs if graph.key == key), None)
        if alike is None:
            return differences(key, [graph.key for graph in self.graphs])
        changed = (attribute for attribute in alike.attributes if not attribute.is_same(self.block, exact=False))
        return "; ".join(attribute.changed_in(self.block) for attribute in changed) or "a size differs"

    def freeze(self) -> None:
        """Freezes the weights with carriers again: `requires_grad_(True)` on the model or PEFT may have undone it."""
        for name in self.carriers:
            self.block.get_parameter(name.removesuffix(CARRIER)).requires_grad_(False)

    def check_needless(self, reason: str | None) -> None:
        """Raises RuntimeError where the original forward would leave weights untrained: those with carriers."""
        if self.carriers:
            raise RuntimeError(
                f"velora_fx: {self.name or 'the model'} has factored gradients, which its graph alone gives, and none "
                f"can run: {reason}. Plan with example_inputs like this call, or with gradients='dense'"
            )

    def extra(self, call: Call) -> list[torch.Tensor]:
        """What a graph is given after the call's tensors: the live carriers, and the projections."""
        carriers = carriers_of(self.block)
        missing = [name for name in self.carriers if name not in carriers]
        if missing:
            self.check_needless(f"{missing[0]} is gone: restore the model, change it, and optimize it again")
        return [*(carriers[name] for name in self.carriers), *self.placed_on(call.tensors[0].device)]

    @property
    def directions(self) -> dict[Carrier, torch.Tensor]:
        """The projection v [G, M] of each carrier's weight, on the CPU."""
        choices = self.choices.values()
        return {choice.carrier: self.projections[choice.tensor] for choice in choices if choice.carrier}

    def graph_for(self, call: Call) -> RegionGraph | None:
        """The graph that stands for the call; captured now if there is none yet and room for one more."""
        key = key_of(call)
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
        self.placed = dict(self.projections)

    def placed_on(self, device: torch.device) -> list[torch.Tensor]:
        """The projections on a device; they stay there until another one is asked for."""
        placed = list(self.placed.values())
        if all(v.device == device for v in placed):
            return placed
        moved = {name: v.to(device) for name, v in self.projections.items()}
        if not torch.compiler.is_compiling():
            self.placed = moved
        return list(moved.values())

    def placed_by_name(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The same by the tensor's name."""
        return dict(zip(self.projections, self.placed_on(device), strict=True))


def _tell_traced(context: Any) -> None:
    """Runs while Dynamo traces `Region.fall_back`, with its locals: an ordinary warning would not be seen there."""
    region = context.get_local("self")._i_will_not_complain_if_bc_breaks_VariableTracker().value
    region.tell(*(context.get_local(name).as_python_constant() for name in ("reason", "key")), is_traced=True)


def make_call(block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """A call of a block as regions see it: empty caches are None."""
    args, kwargs = without_empty_caches(args, kwargs, _layer_of(block))
    structure, leaves = flatten((args, kwargs))
    return Call(block, args, kwargs, structure, leaves, state_of(block))


def _layer_of(block: torch.nn.Module) -> int:
    """The block's slot in a cache, as Hugging Face models number them."""
    numbers = (vars(child).get("layer_idx") for child in block.modules())
    return next((number for number in numbers if isinstance(number, int)), 0)


def rewritten(graph: RegionGraph, choices: Mapping[str, Choice]) -> RegionGraph:
    """A copy of a prepared graph with the choices put in; without `gm` if none of them applies to it."""
    if graph.captured is None or graph.gm is None:
        return graph
    is_factored = any(choice.carrier for choice in choices.values())
    if graph.checkpoint is not None and not is_factored:
        return RegionGraph(graph.key, graph.attributes, None, CHECKPOINTED)
    carried = {choice.carrier.parameter for choice in choices.values() if choice.carrier}
    trainable = {name for name, *_, requires_grad in graph.key[3] if requires_grad} | carried
    key = with_frozen(graph.key, carried)
    wanted = {
        product.consumer
        for product in find_products(graph.gm)
        if product.consumer in choices and product.parameter in trainable
    }
    if not wanted:
        return RegionGraph(key, graph.attributes, None, "none of the weights that the plan compresses is trained")
    gm = copy.deepcopy(graph.gm)
    run(gm, [partial(swap, choices=choices)])
    return RegionGraph(key, graph.attributes, replace(graph.captured, gm=gm))


def hooks_in(block: torch.nn.Module) -> str | None:
    """Which hooks a graph of the block would not call; None if there are none. Those on the block itself run."""
    for name, module in block.named_modules():
        others = (module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if module is not block and (any(others) or not all(map(is_idle, module._forward_hooks.values()))):
            return f"{name} in it has hooks, which a graph would not call"
    if not torch.compiler.is_compiling() and torch.nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return "there are hooks on all modules, which a graph would not call"
    return None


def is_idle(hook: Any) -> bool:
    """True for a hook that transformers leaves on inner modules for good, while the outputs that it collects are not
    asked for."""
    if getattr(hook, "__module__", None) != "transformers.utils.output_capturing":
        return False
    active = hook.__globals__["_active_collector"]
    if torch.compiler.is_compiling() and not active.compiling:
        return False  # it is a ContextVar, which Dynamo cannot read
    collected = active.get()
    return collected is None or hook.__closure__[hook.__code__.co_freevars.index("key")].cell_contents not in collected


def _inside_torch_func() -> bool:
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def run_graph(graph: RegionGraph, inputs: list[torch.Tensor]) -> Any:
    """Runs a region's graph; an error, as of a checkpoint that has recomputed enough, leaves grad mode and autocast."""
    assert graph.gm is not None
    if torch.compiler.is_compiling():
        return graph.gm(*inputs)
    depth, has_gradients = autocast_depth(), torch.is_grad_enabled()
    try:
        return graph.gm(*inputs)
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
