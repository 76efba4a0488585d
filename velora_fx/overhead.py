"""What a device holds besides the tensors of a training step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from velora_fx.timeline import Peak

MIB = 2**20
CONTEXT, WORKSPACES, SLACK, FRAGMENTATION = "CUDA context", "cuBLAS workspaces", "allocator slack", "fragmentation"
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
