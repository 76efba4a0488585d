"""Captured graphs under the key that says which calls they stand for."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.fx import GraphModule

from velora_fx.capture.arguments import unflatten
from velora_fx.capture.checkpoints import Checkpoint
from velora_fx.capture.export import Captured, capture
from velora_fx.capture.graph_pickle import graph_from_data, graph_to_data
from velora_fx.capture.live_block import key_of_modules, key_of_state
from velora_fx.passes import PREPARE, run
from velora_fx.passes.eager_functions import for_eager

PRIMITIVES = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Call:
    """One call of a module: its arguments taken apart and the live state of the module."""

    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    structure: Any
    leaves: list[Any]
    state: dict[str, torch.Tensor]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The inputs of a graph: state first, then the tensors among the arguments."""
        return [*self.state.values(), *self.given]

    @property
    def given(self) -> list[torch.Tensor]:
        """The tensors among the arguments."""
        return [leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor)]


@dataclass(frozen=True)
class Attribute:
    """An attribute that a forward read: the module's name, its own, a copy of its value or the object itself.

    `fields` holds the plain attributes that it read of such an object (a configuration, as a rule).
    """

    module: str
    name: str
    value: Any
    fields: Mapping[str, Any]
    path: tuple[str, ...] = field(init=False, repr=False, compare=False)
    is_plain: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", tuple(filter(None, self.module.split("."))))
        object.__setattr__(self, "is_plain", _is_plain(self.value))

    def is_same(self, module: torch.nn.Module, exact: bool) -> bool:
        """True if the module's attribute is what it was; `exact` also compares the identity of objects."""
        owner: Any = module
        for name in self.path:
            owner = owner._modules[name]
        live = getattr(owner, self.name)
        if self.is_plain:
            return bool(live == self.value)
        if exact and live is not self.value:
            return False
        if torch.compiler.is_compiling() or not self.fields:
            return True
        return all(getattr(live, name, None) == value for name, value in self.fields.items())

    def changed_in(self, module: torch.nn.Module) -> str:
        """What the module's attribute is by now, in words."""
        live, full = getattr(module.get_submodule(self.module), self.name), f"{self.module}.{self.name}".lstrip(".")
        return f"{full} is {live}, not {self.value}" if self.is_plain else f"{full} changed"


@dataclass(eq=False)
class RegionGraph:
    """A prepared graph with its key; `gm` is None where capture failed, and `reason` says why."""

    key: tuple[Any, ...]
    attributes: tuple[Attribute, ...]
    captured: Captured | None
    reason: str | None = None

    def __post_init__(self) -> None:
        guards = self.captured.guards if self.captured else ()
        names = {"Mod": lambda a, b: a % b, "Max": max, "Min": min, "math": math, "torch": torch}
        # Sizes are asked for once: fits(ts) takes them apart for the guards, which are about most of the tensors.
        text = re.sub(r"\bts\[(\d+)\]\.size\(\)", r"sizes[\1]", " and ".join(guards) or "True")
        condition = eval(f"lambda ts, sizes: {text}", names)
        self.fits: Callable[[list[torch.Tensor]], bool] = lambda ts: condition(ts, [t.size() for t in ts])

    def __getstate__(self) -> dict[str, Any]:
        captured = self.captured
        parts = None if captured is None else {**vars(captured), "gm": graph_to_data(captured.gm)}
        return {"key": self.key, "attributes": self.attributes, "captured": parts, "reason": self.reason}

    def __setstate__(self, state: dict[str, Any]) -> None:
        parts = state["captured"]
        captured = None if parts is None else Captured(**{**parts, "gm": graph_from_data(parts["gm"])})
        self.__init__(state["key"], state["attributes"], captured, state["reason"])  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> RegionGraph:
        attributes = copy.deepcopy(self.attributes, memo)
        memo[id(self)] = made = RegionGraph(self.key, attributes, self.captured, self.reason)
        return made

    @property
    def gm(self) -> GraphModule | None:
        """The graph, or None."""
        return self.captured.gm if self.captured else None

    @cached_property
    def eager(self) -> Callable[..., Any]:
        """The graph as a function for calls that nothing traces."""
        assert self.gm is not None
        forward: Callable[..., Any] = for_eager(self.gm).forward
        return forward

    @property
    def checkpoint(self) -> Checkpoint | None:
        """What the forward that it stands for recomputes itself by in backward, if it does."""
        return self.captured.checkpoint if self.captured else None

    @property
    def text(self) -> tuple[Any, ...] | None:
        """The graph as comparable text with all it depends on; None where it has constants or no graph."""
        if self.captured is None or any(node.op == "get_attr" for node in self.captured.gm.graph.nodes):
            return None
        code = self.captured.gm.graph.python_code("self").src
        captured = self.captured
        state = tuple(captured.gm.meta["state"].items())
        return code, state, captured.guards, captured.outputs, captured.constants, captured.slots, captured.checkpoint

    def recomputed(self, run: Callable[[list[Any]], Any], call: Call, extra: Sequence[torch.Tensor] = ()) -> Any:
        """What `run` makes of the call's tensors and `extra`: within the checkpoint that the forward is in, if any."""
        if self.checkpoint is None:
            return run([*call.tensors, *extra])
        return self.checkpoint(lambda *tensors: run([*call.state.values(), *tensors, *extra]), *call.given)

    def result(self, outputs: tuple[Any, ...]) -> Any:
        """The forward's result from the graph's outputs."""
        assert self.captured is not None
        leaves = list(self.captured.constants)
        for slot, value in zip(self.captured.slots, outputs, strict=True):
            leaves[slot] = value
        return unflatten(self.captured.outputs, leaves)


def key_of(call: Call, of_block: tuple[Any, ...] | None = None) -> tuple[Any, ...]:
    """What must be the same for a graph to stand for a call, sizes and plain attributes apart.

    `of_block` is what a key says of the block, where that is known.
    """
    modules, state = of_block or (key_of_modules(call.module), key_of_state(call.state))
    return (
        call.structure,
        tuple([describe_leaf(leaf) for leaf in call.leaves]),
        modules,
        state,
        tuple([(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]),
        _aliases(call.given),
    )


def has_replaced_forwards(module: torch.nn.Module) -> bool:
    """True if a forward in the module was replaced: which function it is, a key does not tell."""
    return any(name and "forward" in vars(child) for name, child in module.named_modules())


def with_frozen(key: tuple[Any, ...], names: Collection[str]) -> tuple[Any, ...]:
    """The key of the same call once the parameters of these names require no gradient."""
    state = tuple((name, *rest, requires and name not in names) for name, *rest, requires in key[3])
    return *key[:3], state, *key[4:]


def _aliases(tensors: list[torch.Tensor]) -> tuple[int, ...]:
    """For each tensor the place of the first that is the same one: a forward may ask whether two are."""
    places = []
    for tensor in tensors:
        for place, other in enumerate(tensors):
            if other is tensor:
                places.append(place)
                break
    return tuple(places)


def describe_leaf(leaf: Any) -> Any:
    """What is the same for arguments that one graph may stand for: of a tensor all but its sizes."""
    if isinstance(leaf, torch.Tensor):
        return ("tensor", leaf.dtype, leaf.device.type, leaf.device.index, leaf.dim())
    return leaf if isinstance(leaf, (*PRIMITIVES, torch.dtype)) else str(leaf)


def find_graph(graphs: Iterable[RegionGraph], call: Call, key: tuple[Any, ...], exact: bool) -> RegionGraph | None:
    """The graph that stands for the call, if there is one; `exact` also compares attributes that are objects."""
    for graph in graphs:
        same = graph.key == key and graph.fits(call.tensors)
        if same and all(attribute.is_same(call.module, exact) for attribute in graph.attributes):
            return graph
    return None


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    return isinstance(value, PRIMITIVES) or (isinstance(value, (tuple, list)) and all(map(_is_plain, value)))


def merge_graph(graphs: Iterable[RegionGraph], new: RegionGraph) -> RegionGraph:
    """An equal graph that was captured before, or the new one.

    Attributes in which the two captures differed (the number of the layer, as a rule) turned out not to matter.
    """
    for graph in graphs:
        if graph.key == new.key and graph.text is not None and graph.text == new.text:
            graph.attributes = tuple(attribute for attribute in graph.attributes if attribute in new.attributes)
            return graph
    return new


def make_graph(call: Call, key: tuple[Any, ...], forward: Callable[..., Any] | None = None) -> RegionGraph:
    """Captures and prepares the graph of a call of `forward` (default: that of the module's class).

    A failure becomes a graph without `gm`.
    """
    try:
        captured = capture(call.module, call.args, call.kwargs, forward)
        run(captured.gm, PREPARE)
        graph = RegionGraph(key, _attributes(call.module, captured), captured)
        graph.fits(call.tensors)
    except Exception as error:
        return RegionGraph(key, (), None, str(error))
    return graph


def _attributes(module: torch.nn.Module, captured: Captured) -> tuple[Attribute, ...]:
    fields_of: dict[tuple[str, ...], list[str]] = {}
    for read in sorted(captured.reads):
        fields_of.setdefault(read[:2], []).extend(read[2:])
    found = []
    for (name, attribute), names in fields_of.items():
        value = getattr(module.get_submodule(name), attribute)
        values = {field: getattr(value, field) for field in names}
        fields = {field: copy.deepcopy(own) for field, own in values.items() if _is_plain(own)}
        found.append(Attribute(name, attribute, copy.deepcopy(value) if _is_plain(value) else value, fields))
    return tuple(found)
