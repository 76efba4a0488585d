"""The fixed unit vectors that sub-tokens are projected on."""

from __future__ import annotations

import hashlib
import math

import torch


def sign_projection(
    seed: int, region: str, tensor: str, num_groups: int, sub_token_size: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Random signs / sqrt(M), [G, M] on the CPU, the same for every device, rank and run.

    The generator's seed is a hash of the arguments; what wrappers add to a name (`module`, `_orig_mod`) does not count.
    """
    digest = hashlib.sha256(f"{seed}/{without_wrappers(f'{region}.{tensor}')}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    bits = torch.randint(0, 2, (num_groups, sub_token_size), generator=generator, device="cpu")
    return (bits.to(dtype) * 2 - 1) / math.sqrt(sub_token_size)


def without_wrappers(name: str) -> str:
    """A dotted name without what DDP and torch.compile add to it."""
    return ".".join(part for part in name.split(".") if part not in ("", "module", "_orig_mod"))


def mean_projection(x: torch.Tensor, sub_token_size: int) -> torch.Tensor:
    """The normalised mean of all sub-tokens of x [..., D] in each group's row, [G, M] (paper, section 3.2).

    Where the mean is zero every direction is as good: the row of ones is taken.
    """
    dtype = torch.promote_types(torch.float32, x.dtype)
    mean = x.detach().reshape(-1, x.shape[-1]).to(dtype).mean(0).reshape(-1, sub_token_size).mean(0)
    if not bool(mean.norm() > 0):
        mean = torch.ones_like(mean)
    v: torch.Tensor = mean / mean.norm()
    return v.expand(x.shape[-1] // sub_token_size, sub_token_size).clone()
