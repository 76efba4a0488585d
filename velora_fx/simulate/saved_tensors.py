"""What the backward pass keeps of a region, and which node keeps it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree

from velora_fx.passes.find_products import find_products
from velora_fx.simulate.tracker import Tracker


@dataclass(frozen=True)
class Saving:
    """One tensor saved for backward: the number and size of its storage, and who saves it.

    `consumer` is set where a linear saves its input for the gradient of its weight, `x` is then the input's node
    name, `shape` and `dtype` those of the input; otherwise it is None and `operation` tells.
    """

    storage: int
    num_bytes: int
    region: str
    operation: str
    consumer: str | None = None
    x: str = ""
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None


class SavedTensors:
    """Collects what is saved for backward while it is on, inside and outside of region graphs.

    `inputs` has the input of each linear, saved or not; `last_uses` maps a storage to the number of the tracker's
    events when a region used it last in its forward.
    """

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.inputs: dict[tuple[str, str], Saving] = {}
        self._savings: dict[int, tuple[Saving, weakref.ref[torch.Tensor]]] = {}
        self._num_saved = 0
        self.last_uses: dict[int, int] = {}
        self._current: tuple[str, Node, str | None, list[Any]] | None = None

    @property
    def savings(self) -> list[Saving]:
        """What was saved, in order, but for what forward itself let go: no loss depends on it (a check on values)."""
        return [saving for saving, _ in self._savings.values()]

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """The context in which everything saved is recorded."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    def run(self, gm: GraphModule, region: str, inputs: list[Any]) -> Any:
        """Runs a region's graph node by node and returns its outputs."""
        return _Recorder(gm, self, region).run(*inputs)

    def at(self, region: str, node: Node, consumer: str | None, operands: list[Any]) -> None:
        """Tells which node runs now."""
        self._current = (region, node, consumer, operands)
        if consumer is not None and (region, consumer) not in self.inputs:
            self.inputs[region, consumer] = self._saving(operands[0], self.tracker.watch(operands[0]))

    def after(self, operands: list[Any]) -> None:
        """Tells that the node has run."""
        self._current = None
        for operand in operands:
            if isinstance(operand, torch.Tensor):
                self.last_uses[self.tracker.watch(operand)] = self.tracker.now

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage, kept, number = self.tracker.watch(tensor), tensor.detach(), self._num_saved
        self._num_saved += 1

        def let_go(_: Any) -> None:
            if self.tracker.moment == "forward":
                del self._savings[number]

        if self.tracker.categories.get(storage) not in ("parameters", "buffers"):
            self._savings[number] = self._saving(tensor, storage), weakref.ref(kept, let_go)
        return kept

    def _saving(self, tensor: torch.Tensor, storage: int) -> Saving:
        size = tensor.untyped_storage().nbytes()
        if self._current is None:
            return Saving(storage, size, "", "an operation outside of the captured regions")
        region, node, consumer, operands = self._current
        operation = getattr(node.target, "__name__", str(node.target)).split(".")[0]
        operation = "attention" if "attention" in operation else operation
        if consumer is not None:
            x = operands[0]
            if self.tracker.is_made_from(storage, self.tracker.watch(x)):
                name = str(node.args[0])
                return Saving(storage, size, region, operation, consumer, name, tuple(x.shape), x.dtype)
        return Saving(storage, size, region, operation)


class _Recorder(Interpreter):
    def __init__(self, gm: GraphModule, saved: SavedTensors, region: str) -> None:
        super().__init__(gm)
        self.saved = saved
        self.region = region
        self.consumers = {product.node: product.consumer for product in find_products(gm) if product.reason is None}

    def run_node(self, n: Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        operands = _pytree.tree_leaves((args, kwargs))
        self.saved.at(self.region, n, self.consumers.get(n), operands)
        try:
            return super().run_node(n)
        finally:
            self.saved.after(operands)


def saved_tensors(gm: GraphModule, inputs: list[Any]) -> tuple[Saving, ...]:
    """Runs the graph once on real or fake inputs and lists what backward keeps besides parameters."""
    tracker = Tracker()
    for tensor in inputs[: len(gm.meta["state"])]:
        tracker.watch(tensor, "parameters")
    saved = SavedTensors(tracker)
    with tracker, saved.on():
        outputs = saved.run(gm, "", inputs)
    del outputs
    return tuple(saved.savings)
