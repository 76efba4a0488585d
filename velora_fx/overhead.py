"""What a device holds besides the tensors of a training step."""

from __future__ import annotations

import torch

MIB = 2**20
# CUDA context with the kernels of PyTorch: 200-700 MB are reported, https://github.com/pytorch/pytorch/issues/28113.
CUDA_CONTEXT_BYTES = 512 * MIB
# One cuBLAS workspace for each of the two threads that launch matrix products (forward, autograd engine):
# 32 MiB on sm_90, https://docs.pytorch.org/docs/stable/notes/cuda.html#cublas-workspaces.
CUBLAS_WORKSPACES_BYTES = 2 * 32 * MIB
# The caching allocator reserves segments of 20 MiB for blocks up to 10 MiB and of 2 MiB for small ones, in a forward
# and a backward pattern each (c10/core/AllocatorConfig.h).
ALLOCATOR_SLACK_BYTES = 128 * MIB


def overhead_bytes(device: torch.device) -> int:
    """Bytes to add to the tensors' peak to compare it with a budget: nothing on CPU, the sum of the above on CUDA."""
    return CUDA_CONTEXT_BYTES + CUBLAS_WORKSPACES_BYTES + ALLOCATOR_SLACK_BYTES if device.type == "cuda" else 0
