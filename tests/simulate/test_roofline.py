"""Predicted times against PyTorch's own count of operations and against bytes counted by hand."""

from __future__ import annotations

import math

import pytest
import torch
import transformers as hf
from torch.utils.flop_counter import FlopCounterMode

from velora_fx.devices import ATTAINED, Device
from velora_fx.simulate import StepTimer, fake_copy, fake_mode

ARITHMETIC = Device(
    "arithmetic alone", 2 * ATTAINED**-1, ATTAINED**-1, math.inf, 0.0
)  # two a second in 16 bits, one in 32
MEMORY = Device("memory alone", math.inf, math.inf, 1.0, 0.0)
LAUNCHES = Device("launches alone", math.inf, math.inf, math.inf, 1.0)


@pytest.mark.parametrize(("dtype", "per_second"), [(torch.float32, 1), (torch.bfloat16, 2)])
def test_operations_of_a_step_are_those_that_pytorch_counts(dtype: torch.dtype, per_second: int) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, vocab_size=128)).to(dtype)
    ids = torch.arange(64).reshape(2, 32)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    fake = fake_copy(model, fake_mode())
    with StepTimer(ARITHMETIC) as timer:
        fake(input_ids=ids, labels=ids).loss.backward()
    assert timer.seconds == pytest.approx(counter.get_total_flops() / per_second)


def test_an_elementwise_operation_takes_the_time_to_read_and_write_its_tensors() -> None:
    x, y = torch.empty(10, 20), torch.empty(20)
    with StepTimer(MEMORY) as timer:
        x.add_(y)
    assert timer.seconds == 4 * (200 + 20 + 200)


def test_an_expanded_tensor_is_read_once() -> None:
    x = torch.empty(20).expand(10, 20)
    with StepTimer(MEMORY) as timer:
        x.clone()
    assert timer.seconds == 4 * (20 + 200)


def test_views_and_allocations_are_free_and_each_other_operation_is_a_launch() -> None:
    with StepTimer(LAUNCHES) as timer:
        x = torch.empty(4, 6)
        x.t().reshape(3, 8)[1:].detach()
        assert timer.seconds == 1  # the reshape of a transposed tensor copies
        torch.relu(x)
        assert timer.seconds == 2


def test_a_product_is_as_slow_as_the_slower_of_arithmetic_and_memory() -> None:
    a, b = torch.empty(8, 4), torch.empty(4, 6)
    flops, num_bytes = 2 * 8 * 4 * 6, 4 * (32 + 24 + 48)
    for rates in (1.0, 1e9):
        device = Device("", 0.0, rates / ATTAINED, 1.0, 0.0)
        with StepTimer(device) as timer:
            a @ b
        assert timer.seconds == pytest.approx(max(flops / rates, num_bytes))


def test_kernels_of_a_compiler_take_their_bytes_and_at_least_a_launch() -> None:
    timer = StepTimer(Device("", 1.0, 1.0, 10.0, 3.0))
    timer.add_kernel(50)
    timer.add_kernel(1)
    assert timer.seconds == 5 + 3


@pytest.mark.parametrize("device", [MEMORY, LAUNCHES], ids=lambda device: device.name)
def test_a_fake_step_takes_as_long_as_the_real_one(device: Device) -> None:
    """Fake tensors are asked for their device by an operator, in backward too."""
    model, x = torch.nn.Linear(4, 6), torch.ones(3, 4)
    seconds = []
    for module in (model, fake_copy(model, fake_mode())):
        with StepTimer(device) as timer:
            module(x).sum().backward()
        seconds.append(timer.seconds)
    assert seconds[0] == seconds[1] > 0
