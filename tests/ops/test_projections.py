"""Projections are unit vectors that depend on the seed and the names alone, or the paper's mean sub-token."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st

from tests.helpers.examples import for_any
from velora_fx.ops import mean_projection, sign_projection

ARGUMENTS = (3, "model.layers.0", "mlp.down_proj.input", 4, 8)


@for_any(
    st.integers(-(2**70), 2**70),
    st.integers(1, 9),
    st.integers(1, 130),
    st.sampled_from([torch.float32, torch.float64]),
    examples=30,
)
def test_rows_are_signs_of_unit_length(seed, groups, size, dtype):
    v = sign_projection(seed, "block", "input", groups, size, dtype)
    assert (v.shape, v.dtype, v.device.type) == ((groups, size), dtype, "cpu")
    torch.testing.assert_close(v.abs(), torch.full((groups, size), size**-0.5, dtype=dtype))
    torch.testing.assert_close(v.norm(dim=1), torch.ones(groups, dtype=dtype))


def test_both_signs_are_equally_likely_and_rows_are_independent():
    v = sign_projection(0, "block", "input", 64, 64, torch.float64)
    assert abs(v.sign().mean()) < 4 / 64
    assert (v @ v.t() - torch.eye(64, dtype=torch.float64)).abs().max() < 6 / 8


def test_a_fresh_process_makes_the_same_signs():
    made = f"sign_projection(*{ARGUMENTS}).sign().int().tolist()"
    code = f"from velora_fx.ops import sign_projection; print({made})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(sign_projection(*ARGUMENTS).sign().int().tolist())


def test_the_global_random_state_neither_matters_nor_changes():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = sign_projection(*ARGUMENTS)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(sign_projection(*ARGUMENTS), first)


def test_the_default_device_and_dtype_do_not_matter():
    expected = sign_projection(*ARGUMENTS)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            v = sign_projection(*ARGUMENTS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (v.device, v.dtype) == (expected.device, expected.dtype) and torch.equal(v, expected)


@pytest.mark.parametrize(
    "region",
    [
        "module.model.layers.0",
        "_orig_mod.model.layers.0",
        "model.layers.0._orig_mod",
        "module._orig_mod.model.layers.0",
    ],
)
def test_the_names_that_wrappers_add_do_not_matter(region):
    seed, _, *rest = ARGUMENTS
    assert torch.equal(sign_projection(seed, region, *rest), sign_projection(*ARGUMENTS))


def test_seeds_regions_and_tensors_have_signs_of_their_own():
    names = [(0, "a", "x"), (1, "a", "x"), (-1, "a", "x"), (0, "b", "x"), (0, "a", "y"), (0, "", "x"), (10, "", "x")]
    made = [sign_projection(*name, 4, 16) for name in names]
    assert not any(torch.equal(one, other) for one, other in combinations(made, 2))


@for_any(
    st.lists(st.integers(1, 4), max_size=2),
    st.integers(1, 4),
    st.integers(1, 6),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.integers(0, 99),
    examples=30,
)
def test_the_mean_projection_is_the_normalised_mean_of_all_sub_tokens(lead, groups, size, dtype, seed):
    """The definition of the paper's section 3.2 in float64, in each group's row."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(*lead, groups * size, generator=generator, dtype=torch.float64) + 0.5).to(dtype)
    mean = sum(x.double().reshape(-1, size)) / (x.numel() // size)
    v = mean_projection(x, size)
    assert v.shape == (groups, size)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(v.double(), (mean / mean.norm()).expand(groups, size), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("x", [torch.zeros(3, 8), torch.tensor([[1.0, -2.0, -1.0, 2.0]])], ids=["zeros", "cancelling"])
def test_a_mean_of_zero_gives_the_row_of_ones(x):
    torch.testing.assert_close(mean_projection(x, 2), torch.full((x.shape[-1] // 2, 2), 0.5**0.5))


def test_the_mean_projection_wants_no_gradient():
    assert not mean_projection(torch.randn(3, 8, requires_grad=True), 4).requires_grad
