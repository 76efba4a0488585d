"""The predicted time of a training step: operations and bytes against the rates of a device."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from velora_fx.devices import Device
from velora_fx.simulate.observer import Observer, bytes_behind, tensors_among

aten = torch.ops.aten
FREE = (
    aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten.new_empty_strided, aten.detach,
    aten._unsafe_view,
)  # fmt: skip


class StepTimer(Observer):  # type: ignore[no-untyped-call]
    """Adds up in `seconds` what each operator would take on the device: the roofline model.

    An operator takes as long as its arithmetic (of matrix products and attention) or the reading and writing of its
    tensors, whichever is longer, and never less than a launch. Views are free, and so are questions (`tensor.device`).
    """

    def __init__(self, device: Device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.seconds = 0.0

    def add_kernel(self, num_bytes: int) -> None:
        """Adds a fused kernel that reads and writes so many bytes."""
        self.seconds += max(num_bytes / self.device.bytes_per_second, self.device.launch_seconds)

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Adds the operator's time."""
        packet = getattr(func, "overloadpacket", None)
        if packet is None or packet in FREE or func.is_view or func.namespace == "prim":
            return
        tensors = [*tensors_among(args), *tensors_among(kwargs), *tensors_among(result)]
        if not tensors:
            return
        moved = sum(bytes_behind(tensor) for tensor in tensors) / self.device.bytes_per_second
        formula = flop_registry.get(packet)
        flops = formula(*args, **kwargs, out_val=result) if formula else 0
        computed = self.device.matmul_seconds(flops, tensors[0].dtype)
        self.seconds += max(moved, computed, self.device.launch_seconds)
