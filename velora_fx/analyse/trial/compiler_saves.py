"""What compiled graphs keep for backward, in the terms of an eager step's saved tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from velora_fx.analyse.trial.probe import Findings, full_name
from velora_fx.passes.find_products import find_products
from velora_fx.passes.kept_for_backward import Kept
from velora_fx.simulate import Saving
from velora_fx.simulate.compiled import Observe
from velora_fx.simulate.equal_blocks import BlockTracker


class KeptTensors:
    """Collects what the compiled graphs of a step keep: `savings` and `last_uses` as in `SavedTensors`.

    `findings` tells which products the model has. A compiled forward counts as one use: what it keeps is last used at
    its end.
    """

    def __init__(self, findings: Findings, tracker: BlockTracker) -> None:
        self.tracker = tracker
        self.savings: list[Saving] = []
        self.last_uses: dict[int, int] = {}
        uses = list(reversed(findings.uses.values()))
        self._uses = {use.weight: use for use in uses} | {full_name(use.region, use.parameter): use for use in uses}
        self._inputs = _inputs(findings)
        self._regions = list(findings.graphs)

    def observer_of(self, state: Mapping[int, str]) -> Observe:
        """The observer of a graph whose inputs of these numbers are these parameters and buffers."""

        region = next((name for name in self._regions if _belongs(state, name)), "")

        def observe(tensors: Mapping[str, torch.Tensor], kept: Mapping[str, Kept]) -> None:
            for name, tensor in tensors.items():
                storage = self.tracker.watch(tensor)
                if self.tracker.categories.get(storage) not in ("parameters", "buffers"):
                    self.savings += self._savings(name, tensor, storage, kept[name], state, region)
                    self.last_uses[storage] = self.tracker.now

        return observe

    def _savings(
        self, name: str, tensor: torch.Tensor, storage: int, kept: Kept, state: Mapping[int, str], region: str
    ) -> list[Saving]:
        size = tensor.untyped_storage().nbytes()
        found = [Saving(storage, size, region, _plain(operation)) for operation in kept.operations]
        for number, num_rows, width in sorted(kept.gradients_of):
            use = self._uses.get(state.get(number, ""))
            if use is None:
                found.append(Saving(storage, size, region, "a product with another activation"))
                continue
            shape = tuple(tensor.shape) if tensor.shape[-1] == width else (num_rows, width)
            x, dtype = self._inputs.get((use.region, use.consumer), (name, tensor.dtype))
            found.append(Saving(storage, size, use.region, "linear", use.consumer, x, shape, dtype))
        return found or [Saving(storage, size, region, "the compiled backward")]


def _belongs(state: Mapping[int, str], region: str) -> bool:
    return bool(state) and all(name.startswith(f"{region}.") for name in state.values())


def _plain(operation: str) -> str:
    return "attention" if "attention" in operation else operation


def _inputs(findings: Findings) -> dict[tuple[str, str], tuple[str, torch.dtype]]:
    """The name of each product's input, and its dtype before any autocast: projections are made of that.

    The compiler keeps one tensor for several views of it, of which each has projections of its own.
    """
    inputs = {}
    for region, graphs in findings.graphs.items():
        for graph in graphs:
            for product in find_products(graph.gm) if graph.gm is not None else ():
                x = product.node.args[0]
                value = x.meta.get("val") if isinstance(x, torch.fx.Node) else None
                if isinstance(value, torch.Tensor):
                    inputs[region, product.consumer] = str(x), value.dtype
    return inputs
