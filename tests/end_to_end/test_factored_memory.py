"""What factored gradients take, on the real allocator and as planned."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn

import velora_fx
from tests.helpers.factored import CASES, carriers, loss_value
from tests.helpers.gradients import tightest
from velora_fx.cli import presets

SIZE = 32


def update_bytes(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> int:
    """Bytes of gradients and of the optimizer's state but for counters."""
    tensors = [p.grad for p in parameters] + [
        value for p in parameters for value in optimizer.state[p].values() if value.numel() > 1
    ]
    assert len(tensors) == 3 * len(parameters)
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)


@pytest.mark.slow
def test_a_step_of_the_130m_shape_takes_what_was_planned_and_updates_a_thirtieth() -> None:
    model, _ = presets.load("llama-130m", 1, 256, torch.float32)
    model = model.to_empty(device="cpu").train()
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    model.config.use_cache = False
    ids = torch.randint(0, model.config.vocab_size, (1, 256))
    batch = {"input_ids": ids, "labels": ids}
    plan = tightest(model, batch, gradients="factored", sub_token_sizes=(SIZE,), device="cpu", optimizer="adamw")
    velora_fx.apply(model, plan, batch)
    optimizer = torch.optim.AdamW(model.parameters())
    for number in range(2):
        with velora_fx.measure(model) if number else contextlib.nullcontext():
            model(**batch).loss.backward()
            optimizer.step()
        if not number:
            optimizer.zero_grad()
    stepped = list(carriers(model).values())
    dense_bytes = sum(3 * model.get_parameter(name.removesuffix("_carrier")).nbytes for name in carriers(model))
    assert len(stepped) == 7 * 12 and update_bytes(optimizer, stepped) <= dense_bytes / 30
    made = velora_fx.plan_of(model)
    assert made.measured is not None
    assert abs(made.planned.peak_bytes / made.measured.allocated_bytes - 1) <= 0.02
    decisions = made.compressed
    assert sum(d.update_bytes_after for d in decisions) == pytest.approx(update_bytes(optimizer, stepped), rel=0.01)
    assert sum(d.update_bytes_before for d in decisions) == pytest.approx(dense_bytes, rel=0.01)


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_peak_of_a_small_step_is_as_planned(name: str, accumulation: int) -> None:
    case = CASES[name]
    model, batch = case.build(), case.batch(8, 48)
    plan = tightest(model, batch, gradients="factored", gradient_accumulation=accumulation, optimizer="adamw")
    velora_fx.apply(model, plan, batch)
    optimizer = torch.optim.AdamW(model.parameters())
    for number in range(2):
        with velora_fx.measure(model) if number else contextlib.nullcontext():
            for _ in range(accumulation):
                loss_value(model(**batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
    made = velora_fx.plan_of(model)
    assert made.measured is not None
    assert abs(made.planned.peak_bytes / made.measured.allocated_bytes - 1) <= 0.02
    assert made.planned.peak_bytes < 0.9 * made.baseline.peak_bytes


def losses(model: nn.Module, order: Sequence[int]) -> list[float]:
    """The loss of each of as many steps in bfloat16."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for number in order:
        optimizer.zero_grad()
        loss = loss_value(model(**CASES["llama"].batch(4, 24, seed=number)))
        loss.backward()
        optimizer.step()
        found.append(float(loss))
    return found


@pytest.mark.slow
def test_in_bfloat16_it_differs_from_dense_by_less_than_another_order_of_the_data_does() -> None:
    model = CASES["llama"].build().to(torch.bfloat16)
    example = CASES["llama"].batch(4, 24)
    plan = tightest(model, example, gradients="factored", optimizer="adamw")
    models = [
        velora_fx.apply(copy.deepcopy(model), made, example)
        for made in (plan, replace(plan, gradients="dense"), replace(plan, gradients="dense"))
    ]
    order = [number % 10 for number in range(50)]
    ours, dense, shuffled = (losses(m, o) for m, o in zip(models, (order, order, order[::-1]), strict=True))
    last = slice(40, 50)
    mean = [sum(values[last]) / 10 for values in (ours, dense, shuffled)]
    assert dense[-1] < dense[0] - 0.2  # it learns
    assert abs(mean[0] - mean[1]) <= abs(mean[1] - mean[2])
