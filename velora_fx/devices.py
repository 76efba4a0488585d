"""Devices: how fast they are, and what they hold besides the tensors of a training step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from velora_fx.peaks import CONTEXT, FRAGMENTATION, SLACK, WORKSPACES, Peak

TERA, GIGA = 1e12, 1e9
MIB = 2**20
FIXED_BYTES: Mapping[str, int] = {
    # With the kernels of PyTorch: 200-700 MB are reported, https://github.com/pytorch/pytorch/issues/28113.
    CONTEXT: 512 * MIB,
    # One for each of the two threads that launch matrix products (forward, autograd engine), from PyTorch's allocator:
    # 32 MiB on sm_90, https://docs.pytorch.org/docs/stable/notes/cuda.html#cublas-workspaces; less on older devices.
    WORKSPACES: 2 * 32 * MIB,
    # The caching allocator reserves segments of 20 MiB for blocks up to 10 MiB and of 2 MiB for small ones, in a
    # forward and a backward pattern each, and rounds larger ones up to 2 MiB (c10/core/AllocatorConfig.h).
    SLACK: 128 * MIB,
}
# Reserved over allocated bytes of training on GPUs, slack included: 3.0%, 4.4% and 4.6% at 8 to 13 GiB (BERT,
# https://github.com/huggingface/peft/issues/1469), 3.0% at 14 GiB (https://github.com/pytorch/pytorch/pull/44742). It
# was 11% and 19% at 5 and 3 GiB there, with memory to spare: where there is none, the allocator gives unused segments
# back before it fails (c10/cuda/CUDACachingAllocator.cpp). PYTORCH_ALLOC_CONF=expandable_segments:True needs less.
FRAGMENTATION_PERCENT = 4
ALLOCATOR_BLOCK_BYTES = {"cuda": 512}  # c10/core/AllocatorConfig.h: kMinBlockSize
# The share of the peak rate of matrix products that is reached, as torch.distributed._tools.RuntimeEstimator has it.
ATTAINED = 0.75


@dataclass(frozen=True)
class Device:
    """Peak rates of dense matrix products in 16-bit floats and in float32 (no TF32, PyTorch's default), the bandwidth
    of memory, and the least time of an operation in eager mode."""

    name: str
    half_flops_per_second: float
    float_flops_per_second: float
    bytes_per_second: float
    launch_seconds: float = 5e-6

    def matmul_seconds(self, flops: float, dtype: torch.dtype) -> float:
        """Seconds for so many operations of matrix products in this dtype."""
        is_half = dtype in (torch.float16, torch.bfloat16)
        return flops / (ATTAINED * (self.half_flops_per_second if is_half else self.float_flops_per_second))


# NVIDIA's data sheets and architecture white papers; without sparsity, 16-bit products with float32 accumulation.
GPUS = (
    Device("T4", 65 * TERA, 8.1 * TERA, 320 * GIGA),
    Device("V100", 125 * TERA, 15.7 * TERA, 900 * GIGA),
    Device("RTX 3090", 71 * TERA, 35.6 * TERA, 936 * GIGA),
    Device("RTX 4090", 165.2 * TERA, 82.6 * TERA, 1008 * GIGA),
    Device("RTX 5090", 209.5 * TERA, 104.8 * TERA, 1792 * GIGA),
    Device("A10G", 70 * TERA, 35 * TERA, 600 * GIGA),
    Device("A10", 125 * TERA, 31.2 * TERA, 600 * GIGA),
    Device("L4", 121 * TERA, 30.3 * TERA, 300 * GIGA),
    Device("L40S", 362 * TERA, 91.6 * TERA, 864 * GIGA),
    Device("A100", 312 * TERA, 19.5 * TERA, 2039 * GIGA),
    Device("H100", 989 * TERA, 67 * TERA, 3350 * GIGA),
    Device("H200", 989 * TERA, 67 * TERA, 4800 * GIGA),
    Device("B200", 2250 * TERA, 75 * TERA, 8000 * GIGA),
)
TYPICAL_GPU = "A100"
# One core: two 8-wide multiply-adds in each of 2.5e9 cycles, and its part of a server's memory bandwidth.
CPU = Device("CPU", 80 * GIGA, 80 * GIGA, 10 * GIGA, 1e-6)


def device_rates(device: torch.device) -> Device:
    """The rates of the device that is planned for; a typical GPU where CUDA is planned for without one, or unknown."""
    if device.type != "cuda":
        return CPU
    name = torch.cuda.get_device_name(device) if torch.cuda.is_available() else TYPICAL_GPU
    known = {gpu.name: gpu for gpu in GPUS}
    words = name.replace("-", " ")
    fitting = [gpu for gpu in GPUS if f" {gpu.name} " in f" {words} "]
    return fitting[0] if fitting else known[TYPICAL_GPU]


def overhead_of(device: torch.device, tensor_bytes: int) -> dict[str, int]:
    """What a device holds besides tensors of so many bytes, by name: nothing on CPU.

    The fixed numbers above, and a share of the tensors for memory that fragmentation makes unusable.
    """
    if device.type != "cuda":
        return {}
    return {**FIXED_BYTES, FRAGMENTATION: -(-tensor_bytes * FRAGMENTATION_PERCENT // 100)}


def with_overhead(peak: Peak, device: torch.device) -> Peak:
    """A peak of tensors as a peak of the device."""
    overhead = overhead_of(device, peak.peak_bytes)
    return replace(peak, peak_bytes=peak.peak_bytes + sum(overhead.values()), overhead=overhead)


def tensors_within(budget_bytes: int, device: torch.device) -> int:
    """The most bytes of tensors that fit a budget with their overhead; negative if not even the fixed part does.

    It is the exact inverse of `overhead_of`, so that a plan of tensors within it is a plan within the budget.
    """
    if device.type != "cuda":
        return budget_bytes
    return (budget_bytes - sum(FIXED_BYTES.values())) * 100 // (100 + FRAGMENTATION_PERCENT)


def autocast_of(device_type: str) -> str | None:
    """The dtype of the autocast that is on, as "bfloat16"; None where it is off."""
    is_on = torch.is_autocast_enabled(device_type)
    return str(torch.get_autocast_dtype(device_type)).removeprefix("torch.") if is_on else None
