"""A model whose blocks are compiled one by one (`block.compile()`) and that runs eagerly around them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from velora_fx.capture import RegionGraph, find_blocks
from velora_fx.simulate.compiled.block_graphs import BlockGraphs
from velora_fx.simulate.compiled.inductor import Inductor
from velora_fx.simulate.compiled.program import unobserved

Held = WeakKeyDictionary[Any, list[torch.Tensor]]  # by the cache that it is in, as long as that lives


def compile_blocks(
    model: torch.nn.Module,
    graphs: Mapping[str, Sequence[RegionGraph]],
    inductor: Inductor,
    passed_by: Collection[str] = (),
) -> None:
    """Has the blocks of a fake model run as they do after `block.compile()`, for good.

    Where nothing repeats the model stays as it is. `graphs` are those of the untouched blocks by name; a block that no
    graph can be made for runs eagerly. `passed_by` is as in `find_blocks`.
    """
    block_graphs, held = BlockGraphs(graphs), Held()
    for name, block in find_blocks(model, passed_by).items():
        if block is not model:
            block.forward = _CompiledBlock(name, block, block.forward, block_graphs, inductor, held)


class _CompiledBlock:
    def __init__(
        self,
        name: str,
        block: torch.nn.Module,
        forward: Any,
        block_graphs: BlockGraphs,
        inductor: Inductor,
        held: Held,
    ) -> None:
        self.name, self.block, self.forward = name, block, forward
        self.block_graphs, self.inductor, self.held = block_graphs, inductor, held

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = self.block_graphs.find(self.name, self.block, self.forward, args, kwargs, (), captures=True)
        if found is None:
            return self.forward(*args, **kwargs)
        outputs = self.inductor.run(found.gm, found.inputs, unobserved({}))
        num_results = len(found.captured.slots)
        for cache in found.caches:
            self.held.setdefault(cache, []).extend(outputs[num_results:])
        return found.graph.result(outputs[:num_results])
