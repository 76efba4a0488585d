"""The kernel of `velora::fold`, interpreted on the CPU and compiled for GPUs."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl

from tests.helpers.machine_code import LOAD, STORE, WIDE_LOAD, WIDE_STORE, compiled, ulps
from velora_fx.ops.kernels.fold import _fold_kernel, fold, fold_naive

SHAPES = [(5, 6, 8), (9, 3, 43), (3, 2, 127), (33, 64, 4), (1500, 5, 2)]
KEEP = 0.75


def sample(out, groups, size, dtype, transposed, number=3):
    torch.manual_seed(0)
    weights = [torch.randn(out, groups * size).to(dtype) for _ in range(number)]
    carriers = [torch.randn(out, groups).to(dtype) for _ in range(number)]
    if transposed:
        weights, carriers = ([t.t().contiguous().t() for t in tensors] for tensors in (weights, carriers))
    return weights, carriers, [torch.randn(groups, size).sign() / size**0.5 for _ in range(number)]


def folded(out, groups, size, dtype, transposed):
    weights, carriers, vs = sample(out, groups, size, dtype, transposed)
    fold(weights, carriers, vs, torch.tensor(KEEP, dtype=torch.float64))
    return weights


@pytest.mark.parametrize(("out", "groups", "size"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_entry_is_decayed_and_stepped_and_rounded_once(interpreted, out, groups, size, dtype, transposed):
    found = interpreted(folded, out, groups, size, dtype, transposed)
    for weight, old, carrier, v in zip(found, *sample(out, groups, size, dtype, transposed), strict=True):
        kept, step = KEEP * old.double(), (carrier.double().unsqueeze(-1) * v.double().sign()).flatten(1)
        parts = kept.abs() + step.abs()  # cancellation leaves the float32 rounding of the parts
        eps = ulps(dtype) * torch.finfo(dtype).eps
        assert ((weight.double() - kept - step).abs() <= eps * (kept + step).abs() + 2e-7 * parts).all()
        assert weight.stride() == old.stride()


def folded_naively(transposed):
    weights, carriers, vs = sample(5, 3, 8, torch.bfloat16, transposed)
    fold_naive(weights, carriers, vs, torch.tensor(KEEP, dtype=torch.float64))
    return weights


@pytest.mark.parametrize("transposed", [False, True])
def test_the_naive_version_has_the_same_values(interpreted, transposed):
    ours, naive = interpreted(folded, 5, 3, 8, torch.bfloat16, transposed), folded_naively(transposed)
    torch.testing.assert_close(ours, naive, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-2)


def folded_mixed():
    first, second = sample(5, 3, 8, torch.float32, False, 2), sample(4, 2, 6, torch.float64, True, 1)
    together = [a + b for a, b in zip(first, second, strict=True)]
    fold(*together, torch.tensor(KEEP, dtype=torch.float64))
    return together[0]


def test_weights_of_several_kinds_are_folded_in_one_call(interpreted):
    expected = []
    for made in (sample(5, 3, 8, torch.float32, False, 2), sample(4, 2, 6, torch.float64, True, 1)):
        fold_naive(*made, torch.tensor(KEEP, dtype=torch.float64))
        expected += made[0]
    torch.testing.assert_close(interpreted(folded_mixed), expected)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [2, 32, 128])
def test_compiled_for_a_gpu_it_moves_the_weight_16_bytes_at_once_and_spills_nothing(size, transposed, arch, tmp_path):
    signature = {
        "addresses": "*i64", "directions": "*fp32", "keep": "*fp64", "num_out": "i32", "width": "i32", "stride": "i32",
        "out_stride": "i32", "group_stride": "i32",
    }  # fmt: skip
    constants = {
        "M": size, "TRANSPOSED": transposed, "BLOCK_ACROSS": 4, "BLOCK_ALONG": 1024, "WEIGHT": tl.bfloat16,
        "CARRIER": tl.bfloat16, "ACCUMULATOR": tl.float32, "ALIGNED": True,
    }  # fmt: skip
    code = compiled(_fold_kernel, signature, constants, True, arch, 4, tmp_path)
    assert code.count(WIDE_STORE) == code.count(STORE) > 0 and code.spilled_bytes == 0
    assert code.count(WIDE_LOAD) >= code.count(WIDE_STORE) and code.count(LOAD) > 0
