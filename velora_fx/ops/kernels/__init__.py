"""Triton kernels for CUDA devices, one a file, each beside a naive version of itself; no autograd, no torch.fx."""
