"""The kernel of `velora::compress`, interpreted on the CPU and compiled for GPUs."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl
from torch.nn import functional as F

from tests.helpers.machine_code import LOAD, WIDE_LOAD, compiled, far_rows, ulps
from velora_fx.ops.kernels.compress import _compress_kernel, compress, compress_naive

SHAPES = [
    ((5,), 6, 8), ((3, 7), 3, 43), ((33,), 2, 127), ((1,), 1, 2), ((2, 3, 5), 64, 4), ((4,), 5, 1), ((70,), 7, 128),
    ((5,), 2, 1300), ((0, 3), 2, 4), ((3,), 0, 8), ((3,), 2, 0),
]  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def sample(lead: tuple[int, ...], groups: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    v = F.normalize(torch.randn(groups, size, dtype=torch.float64), dim=1)
    return torch.randn(*lead, groups * size, dtype=torch.float64).to(dtype), v.to(
        torch.promote_types(dtype, torch.float32)
    )


def is_rounded_once(z: torch.Tensor, x: torch.Tensor, v: torch.Tensor) -> bool:
    """True if z is the exact projection, summed in float32 or better and rounded once to its dtype."""
    parts = x.double().unflatten(-1, v.shape) * v.double()
    truth, dtype = parts.sum(-1), z.dtype
    sum_error = 16 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * parts.abs().sum(-1)
    rounding = ulps(dtype) * torch.finfo(dtype).eps * truth.abs() + torch.finfo(dtype).smallest_normal
    return bool(((z.double() - truth).abs() <= 1.01 * rounding + sum_error).all())


@pytest.mark.parametrize(("lead", "groups", "size"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_projection_is_the_exact_one_rounded_once(interpreted, lead, groups, size, dtype):
    x, v = sample(lead, groups, size, dtype)
    z = interpreted(compress, x, v)
    assert (z.shape, z.dtype) == ((*lead, groups), dtype) and is_rounded_once(z, x, v)


def test_the_naive_version_is_exact_too():
    x, v = sample((9,), 4, 16, torch.bfloat16)
    assert is_rounded_once(compress_naive(x, v), x, v)


@pytest.mark.parametrize("layout", ["rows of a wider matrix", "transposed", "heads swapped", "one row for all"])
def test_strided_rows_are_read_where_they_lie(interpreted, layout):
    x, v = sample((4, 6), 3, 16, torch.float32)
    if layout == "rows of a wider matrix":
        x = torch.cat((x, x), -1)[..., 16:64]
    elif layout == "transposed":
        x = x.mT.contiguous().mT
    elif layout == "heads swapped":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    else:
        x = x[:1, :1].expand(4, 6, -1)
    assert is_rounded_once(interpreted(compress, x, v), x, v)


def test_one_direction_for_all_groups_may_be_a_broadcast_view(interpreted):
    x, v = sample((4,), 6, 8, torch.float32)
    v = v[:1].expand(6, -1)
    assert is_rounded_once(interpreted(compress, x, v), x, v)


def projections_of_far_rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, v = sample((3,), 4, 16, torch.bfloat16)
    return compress(far_rows(64).copy_(rows), v), rows, v


def test_rows_beyond_two_billion_elements_are_found(interpreted):
    assert is_rounded_once(*interpreted(projections_of_far_rows))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("size", [2, 8, 16, 32, 64, 128])
def test_compiled_for_a_gpu_it_loads_16_bytes_at_once_and_spills_nothing(size, arch, tmp_path):
    code = code_of(size, 8, 1024 // size, size, 4, arch, True, tmp_path)
    assert code.count(WIDE_LOAD) == code.count(LOAD) >= 8 and code.spilled_bytes == 0
    assert "cvt.rn" in code.ptx


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("size", "block_size"), [(43, 64), (127, 128)])
def test_compiled_for_sizes_that_align_with_nothing_it_sums_within_a_warp_and_spills_nothing(
    size, block_size, arch, tmp_path
):
    code = code_of(size, 8, 256 // block_size, block_size, 1, arch, False, tmp_path)
    assert code.spilled_bytes == 0 and "bar.sync" not in code.ptx


def code_of(size, rows, groups, block_size, num_warps, arch, aligned, path):
    signature = {"x": "*bf16", "v": "*fp32", "z": "*bf16", "num_rows": "i32", "num_groups": "i32", "row_stride": "i32"}
    constants = {"M": size, "BLOCK_N": rows, "BLOCK_G": groups, "BLOCK_M": block_size, "ACCUMULATOR": tl.float32}
    return compiled(_compress_kernel, signature, constants, aligned, arch, num_warps, path)
