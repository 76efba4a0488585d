"""The kernel of `velora::expand`, interpreted on the CPU and compiled for GPUs."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl

from tests.helpers.machine_code import STORE, WIDE_STORE, compiled, far_rows, ulps
from velora_fx.ops.kernels.expand import _expand_kernel, expand, expand_naive

SHAPES = [(5, 6, 8), (9, 3, 43), (3, 2, 127), (2, 3, 1), (33, 64, 4), (1500, 5, 2)]


def sample(out: int, groups: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    v = torch.randn(groups, size, dtype=torch.promote_types(dtype, torch.float32))
    return torch.randn(out, groups).to(dtype), v


@pytest.mark.parametrize(("out", "groups", "size"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_entry_is_the_product_rounded_once_in_the_layout_asked_for(
    interpreted, out, groups, size, dtype, transposed
):
    factor, v = sample(out, groups, size, dtype)
    dweight = interpreted(expand, factor, v, transposed)
    truth = (factor.double().unsqueeze(-1) * v.double()).flatten(1)
    rounding = 1.01 * ulps(dtype) * torch.finfo(dtype).eps * truth.abs() + torch.finfo(dtype).smallest_normal
    assert dweight.stride() == ((1, out) if transposed else (groups * size, 1))
    assert ((dweight.double() - truth).abs() <= rounding).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_the_naive_version_has_the_same_values_and_layout(interpreted, transposed):
    factor, v = sample(5, 3, 8, torch.bfloat16)
    ours, naive = interpreted(expand, factor, v, transposed), expand_naive(factor, v, transposed)
    assert ours.stride() == naive.stride()
    torch.testing.assert_close(ours, naive, rtol=torch.finfo(torch.bfloat16).eps, atol=0)


def test_a_strided_factor_is_read_where_it_lies(interpreted):
    factor, v = sample(6, 4, 8, torch.float32)
    factor = factor.t().contiguous().t()
    assert torch.equal(interpreted(expand, factor, v, False), expand_naive(factor, v, False))


def gradient_of_far_rows() -> tuple[torch.Tensor, torch.Tensor]:
    rows = far_rows(1024)
    factor, v = sample(3, 8, 128, torch.bfloat16)
    _expand_kernel[(1, 1)](
        factor, v, rows, 3, 2**30, 8, 1,
        M=128, TRANSPOSED=False, BLOCK_ACROSS=4, BLOCK_ALONG=1024, ACCUMULATOR=tl.float32, num_warps=4,
    )  # fmt: skip
    return rows.clone(memory_format=torch.contiguous_format), expand_naive(factor, v, False)


def test_entries_beyond_two_billion_are_written_to_their_place(interpreted):
    ours, naive = interpreted(gradient_of_far_rows)
    torch.testing.assert_close(ours, naive, rtol=torch.finfo(torch.bfloat16).eps, atol=0)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [2, 32, 128])
def test_compiled_for_a_gpu_it_stores_16_bytes_at_once_and_spills_nothing(size, transposed, arch, tmp_path):
    signature = {
        "factor": "*bf16", "v": "*fp32", "result": "*bf16", "num_out": "i32", "width": "i32", "out_stride": "i32",
        "group_stride": "i32",
    }  # fmt: skip
    constants = {
        "M": size, "TRANSPOSED": transposed, "BLOCK_ACROSS": 8, "BLOCK_ALONG": 1024, "ACCUMULATOR": tl.float32,
    }  # fmt: skip
    code = compiled(_expand_kernel, signature, constants, True, arch, 4, tmp_path)
    assert code.count(WIDE_STORE) == code.count(STORE) and code.spilled_bytes == 0
