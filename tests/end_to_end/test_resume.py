"""A training run with factored gradients that is broken off and taken up again in another process."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import velora_fx
from tests.helpers.gradients import tightest
from tests.helpers.toys import rows, stack

HALF = 10


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, count: int) -> None:
    for number in range(first, first + count):
        optimizer.zero_grad()
        torch.manual_seed(number)  # dropout
        model(rows() + number).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()


def first_half(path: Path) -> None:
    torch.set_num_threads(1)
    model = stack()
    plan = tightest(model, (rows(),), gradients="factored", seed=5)
    velora_fx.apply(model, plan, (rows(),))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    steps(model, optimizer, 0, HALF)
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "velora": velora_fx.state_dict(model)}
    torch.save(states, path)


def second_half(path: Path) -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    states = torch.load(path, weights_only=True)
    model = stack()
    model.load_state_dict(states["model"], strict=True)
    velora_fx.load_state_dict(model, states["velora"], example_inputs=(rows(),))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer.load_state_dict(states["optimizer"])
    steps(model, optimizer, HALF, HALF)
    return model.state_dict()


def whole() -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    model = stack()
    plan = tightest(model, (rows(),), gradients="factored", seed=5)
    velora_fx.apply(model, plan, (rows(),))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    steps(model, optimizer, 0, 2 * HALF)
    return model.state_dict()


def test_ten_steps_and_ten_in_a_new_process_are_twenty_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    context = multiprocessing.get_context("spawn")
    for work in (first_half, second_half):
        with ProcessPoolExecutor(1, context) as pool:
            result = pool.submit(work, path).result()
    expected = whole()
    assert result.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in result.items())


def test_a_factored_plan_is_not_loaded_without_example_inputs() -> None:
    model = stack()
    velora_fx.apply(model, tightest(model, (rows(),), gradients="factored"), (rows(),))
    state, other = velora_fx.state_dict(model), stack()
    with pytest.raises(ValueError, match="factored gradients need example_inputs"):
        velora_fx.load_state_dict(other, state)
    assert all(p.requires_grad for p in other.parameters())
    assert velora_fx.load_state_dict(model, state) is model
