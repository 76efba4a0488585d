"""Rates of devices by the names that drivers give them."""

from __future__ import annotations

import pytest
import torch

from velora_fx.devices import GPUS, device_rates

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("Some Future GPU", "A100"),
    ],
)
def test_a_gpu_is_known_by_its_drivers_name(monkeypatch: pytest.MonkeyPatch, name: str, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert device_rates(CUDA).name == expected


def test_without_a_gpu_cuda_is_planned_for_at_typical_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_rates(CUDA).name == "A100"
    assert device_rates(torch.device("cpu")).name == "CPU"


def test_sixteen_bit_products_are_faster_and_memory_bound_below_thousands_of_operations_a_byte() -> None:
    for gpu in GPUS:
        assert gpu.matmul_seconds(1e12, torch.bfloat16) < gpu.matmul_seconds(1e12, torch.float32)
        assert 50 < gpu.half_flops_per_second / gpu.bytes_per_second < 500
