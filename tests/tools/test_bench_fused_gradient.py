"""The contender for the weight gradient of `tools/bench ops`, interpreted on the CPU and compiled for GPUs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.helpers.machine_code import compiled
from tools.bench.fused_gradient import CONTENDERS, Tiles, _kernel, weight_gradient

SMALL = Tiles(16, 16, 16, 1, 4, 2)


@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize("rows, out, groups, size", [(70, 40, 24, 8), (5, 16, 16, 2), (33, 17, 3, 43), (48, 1, 1, 128)])
def test_the_fused_gradient_is_the_product_expanded(interpreted, rows, out, groups, size, splits):
    torch.manual_seed(0)
    dy, z, v = torch.randn(rows, out), torch.randn(rows, groups), torch.randn(groups, size)
    dweight = interpreted(weight_gradient, dy, z, v, Tiles(16, 16, 16, splits, 4, 2))
    truth = ((dy.double().t() @ z.double()).unsqueeze(-1) * v.double()).flatten(1)
    torch.testing.assert_close(dweight.double(), truth, rtol=1e-5, atol=1e-5)


def test_it_reads_rows_where_they_lie_and_rounds_once(interpreted):
    torch.manual_seed(0)
    dy = torch.randn(40, 64).half()[:, 16:48]
    z, v = torch.randn(40, 48).half()[:, :16], torch.randn(16, 8)
    dweight = interpreted(weight_gradient, dy, z, v, SMALL)
    truth = ((dy.double().t() @ z.double()).unsqueeze(-1) * v.double()).flatten(1)
    eps = torch.finfo(torch.float16).eps
    assert dweight.dtype == torch.float16
    torch.testing.assert_close(dweight.double(), truth, rtol=eps, atol=eps * float(truth.abs().max()) / 64)


@pytest.mark.parametrize("tiles", CONTENDERS, ids=str)
def test_compiled_for_a_gpu_it_fits_and_spills_nothing(tiles, tmp_path):
    names = ("dy", "z", "v", "parts", "arrived", "result", "num_rows", "num_out", "num_groups", "dy_stride", "z_stride")
    types = ("*bf16", "*bf16", "*fp32", "*fp32", "*i32", "*bf16", *["i32"] * 5)
    constants = {
        "M": 32, "SPLITS": tiles.splits, "BLOCK_O": tiles.out, "BLOCK_G": tiles.groups, "BLOCK_N": tiles.rows,
        "ALONG": 1024,
    }  # fmt: skip
    code = compiled(
        _kernel, dict(zip(names, types, strict=True)), constants, True, 90, tiles.num_warps, tmp_path, tiles.num_stages
    )
    assert code.count("wgmma.mma_async|mma.sync") > 0 and code.spilled_bytes == 0
