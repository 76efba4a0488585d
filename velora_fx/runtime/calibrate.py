"""Projections from data: the mean sub-token of the example inputs or of the first training batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.fx import Interpreter, Node

from velora_fx.capture import key_of
from velora_fx.ops import mean_projection
from velora_fx.runtime.region import Region, make_call
from velora_fx.runtime.stand_in import StandIn


def calibrate(model: torch.nn.Module, regions: Sequence[Region], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Sets every projection to the normalised mean sub-token of its tensor in one forward, the same on all ranks.

    The forward runs without gradients; random state and buffers are put back.
    """
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"]
    calibrators = [_Calibrator(region) for region in regions]
    for calibrator in calibrators:
        calibrator.install()
    try:
        with torch.random.fork_rng(devices=list(dict.fromkeys(devices))), torch.no_grad():
            model(*args, **kwargs)
    finally:
        for calibrator in calibrators:
            calibrator.remove()
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
    if dist.is_available() and dist.is_initialized():
        for region in regions:
            for name, v in region.projections.items():
                on_device = v.to(next(region.block.parameters()).device)
                dist.broadcast(on_device, src=0)
                region.set_projection(name, on_device)


class _Calibrator(StandIn):
    """Stands in for a region, and sets its projections in a call."""

    def __init__(self, region: Region) -> None:
        super().__init__(region.block)
        self.region = region

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        region = self.region
        call = make_call(region.block, args, kwargs)
        graph = region.graph_for(call, key_of(call))
        if graph is None or graph.gm is None:
            return self.original(*args, **kwargs)
        outputs = _MeanOfInputs(graph.gm, region).run(*call.tensors, *region.placed_on(call.tensors[0].device))
        return graph.result(outputs)


class _MeanOfInputs(Interpreter):
    def __init__(self, gm: torch.fx.GraphModule, region: Region) -> None:
        super().__init__(gm)
        self.region = region
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        names = list(region.projections)
        self.tensors = dict(zip(placeholders[-len(names) :], names, strict=True))

    def run_node(self, n: Node) -> Any:
        if n.target is torch.ops.velora.compress.default:
            (x, v), _ = self.fetch_args_kwargs_from_env(n)
            name = self.tensors[n.args[1]]
            mean = mean_projection(x, v.shape[-1]).to(self.region.projections[name].dtype)
            self.region.set_projection(name, mean)
        return super().run_node(n)
