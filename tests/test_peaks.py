"""Predicted beside measured, on numbers made by hand."""

from __future__ import annotations

import pytest
import torch

from velora_fx.devices import with_overhead
from velora_fx.peaks import Measured, Pair, Peak, compare_categories, compare_peaks, mismatch

MIB = 2**20
BREAKDOWN = {"parameters": 300, "buffers": 0, "gradients": 100, "optimizer": 200, "activations": 350, "temporary": 50}


def planned(device: str = "cpu") -> Peak:
    breakdown = {name: size * MIB for name, size in BREAKDOWN.items()}
    return with_overhead(Peak(1000 * MIB, breakdown, "backward"), torch.device(device))


def measured(*, reserved: int | None = None, **changed: int) -> Measured:
    sizes = {"parameters": 300, "buffers": 0, "gradients": 100, "optimizer": 200, "activations and temporary": 400}
    sizes |= {name.replace("_", " "): size for name, size in changed.items()}
    breakdown = {name: size * MIB for name, size in sizes.items()}
    return Measured(sum(breakdown.values()), reserved and reserved * MIB, breakdown)


def test_a_difference_is_that_of_the_prediction_in_percent_of_what_was_measured() -> None:
    assert Pair("allocated", 110, 100).difference_percent == pytest.approx(10)
    assert Pair("allocated", 90, 100).difference_percent == pytest.approx(-10)
    assert Pair("buffers", 5, 0).difference_percent is None


def test_on_cpu_the_tensors_are_compared_and_their_categories() -> None:
    assert compare_peaks(planned(), measured()) == (Pair("allocated", 1000 * MIB, 1000 * MIB),)
    pairs = {
        pair.name: (pair.predicted_bytes, pair.measured_bytes) for pair in compare_categories(planned(), measured())
    }
    assert pairs == {
        "parameters": (300 * MIB, 300 * MIB), "buffers": (0, 0), "gradients": (100 * MIB, 100 * MIB),
        "optimizer": (200 * MIB, 200 * MIB), "activations and temporary": (400 * MIB, 400 * MIB),
    }  # fmt: skip


def test_on_cuda_workspaces_are_allocated_and_the_context_is_not_reserved() -> None:
    found = measured(reserved=1300, other=64)
    assert compare_peaks(planned("cuda"), found) == (
        Pair("allocated", 1064 * MIB, 1064 * MIB),
        Pair("reserved", (1000 + 64 + 128 + 40) * MIB, 1300 * MIB),
    )
    assert compare_categories(planned("cuda"), found)[-1] == Pair("other", 64 * MIB, 64 * MIB)


@pytest.mark.parametrize("activations", [400 - 47, 400, 400 + 52])
def test_a_prediction_within_five_percent_is_good(activations: int) -> None:
    assert mismatch(planned(), measured(activations_and_temporary=activations)) is None


@pytest.mark.parametrize(
    ("changed", "category"),
    [
        ({"activations_and_temporary": 400 - 49}, "activations and temporary"),
        ({"activations_and_temporary": 400 + 54}, "activations and temporary"),
        ({"optimizer": 0, "activations_and_temporary": 500}, "optimizer"),
        ({"gradients": 400}, "gradients"),
        ({"parameters": 500, "optimizer": 100}, "parameters"),
    ],
)
def test_beyond_five_percent_the_category_that_differs_most_is_named(changed: dict[str, int], category: str) -> None:
    assert [pair.name for pair in mismatch(planned(), measured(**changed))] == ["allocated", category]


def test_tensors_that_are_not_the_models_are_a_category_of_their_own_on_cuda() -> None:
    assert mismatch(planned("cuda"), measured(reserved=1300, other=200))[1] == Pair("other", 64 * MIB, 200 * MIB)


@pytest.mark.parametrize("workspaces", [0, 16, 64])
def test_workspaces_that_are_smaller_than_planned_for_are_no_mismatch(workspaces: int) -> None:
    assert mismatch(planned("cuda"), measured(reserved=1200, other=workspaces)) is None


def test_reserved_memory_below_the_prediction_is_good_and_far_above_it_is_fragmentation() -> None:
    assert mismatch(planned("cuda"), measured(reserved=1064, other=64)) is None
    assert mismatch(planned("cuda"), measured(reserved=1290, other=64)) is None
    assert mismatch(planned("cuda"), measured(reserved=1400, other=64)) == (
        Pair("reserved", 1232 * MIB, 1400 * MIB),
        Pair("fragmentation", 168 * MIB, 336 * MIB),
    )
