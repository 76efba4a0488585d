"""Every bad value is refused with what was got and what is allowed."""

from __future__ import annotations

import inspect
import math
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

import velora_fx
from tests.helpers.examples import for_any
from velora_fx.options import GIB, Options, budget_bytes_of, planning_device
from velora_fx.session import with_compiled

CPU = torch.device("cpu")
BAD: tuple[tuple[str, Any, str], ...] = (
    ("method", "velora", "'auto' or 'compress' or 'exact'"),
    *(("compiled", value, "True, 'blocks', False or None") for value in ("inductor", 1)),
    ("gradients", "factored?", "'dense'"),
    *(("projection", value, "'signs' or 'batch_mean'") for value in ("random", ["signs"])),
    *(
        ("sub_token_sizes", value, "integers of at least 2")
        for value in ((), 32, "32", 32.0, (16, 1), (0,), (-4,), (16, 32.0), (True,))
    ),
    *(("gradient_accumulation", value, "at least 1") for value in (0, 2.0, True)),
    *(("seed", value, "an integer") for value in (1.0, None, True)),
    ("filter_fn", "lm_head", "filter_fn(module, name)"),
    ("loss_fn", 1.0, "loss_fn"),
)
GOOD: dict[str, tuple[Any, ...]] = {
    "gradient_accumulation": (8,), "method": ("exact",), "compiled": (True, None), "gradients": ("dense",),
    "projection": ("signs", "batch_mean"), "sub_token_sizes": (None, [2], (32, 16, 32)), "seed": (-(2**80),),
}  # fmt: skip


@pytest.mark.parametrize(("name", "value", "allowed"), BAD, ids=lambda value: repr(value))
def test_a_bad_value_is_named_with_what_is_allowed(name, value, allowed):
    with pytest.raises(ValueError) as caught:
        Options(**{name: value})
    message = str(caught.value)
    assert message.startswith(name) and allowed in message
    assert f"got {value!r}" in message


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in GOOD.items() for value in values])
def test_a_good_value_is_kept(name, value):
    assert getattr(Options(**{name: value}), name) is value


def test_factored_gradients_want_signs_and_compression():
    with pytest.raises(ValueError, match=r"gradients='factored' is exact for .* magnitudes.*batch_mean"):
        Options(gradients="factored", projection="batch_mean")
    with pytest.raises(
        ValueError, match="method='exact' never compresses, and gradients are factored where that is done"
    ):
        Options(gradients="factored", method="exact")
    assert Options(gradients="factored").is_factored and not Options().is_factored


def test_options_are_given_by_name_and_cannot_be_changed_after_the_check():
    with pytest.raises(TypeError):
        Options("adamw")  # type: ignore[misc]
    with pytest.raises(AttributeError):
        Options().seed = 1.5  # type: ignore[misc]


@for_any(st.floats(1e-6, 1e6) | st.integers(1, 10**6), examples=50)
def test_a_budget_is_in_units_of_two_to_the_thirty_bytes(budget):
    got = budget_bytes_of(budget, CPU)
    assert isinstance(got, int)
    assert got <= budget * GIB < got + 1


@pytest.mark.parametrize("budget", ["1", "1GiB", " 1 GiB", "1.0", np.float32(1), np.float64(1), np.int64(1)], ids=repr)
def test_a_budget_may_be_text_with_its_unit_or_a_number_of_numpy(budget):
    got = budget_bytes_of(budget, CPU)
    assert type(got) is int and got == GIB


@pytest.mark.parametrize("budget", [0, -1, 0.0, -0.5, math.nan, math.inf, -math.inf])
def test_a_budget_that_is_no_positive_number_is_refused(budget):
    with pytest.raises(ValueError, match=r"budget_gb must be a positive number of GiB") as caught:
        budget_bytes_of(budget, CPU)
    assert repr(budget) in str(caught.value)


@pytest.mark.parametrize("budget", [None, "24 GB", "cpu", True, [24], torch.tensor(24.0)], ids=repr)
def test_a_budget_that_is_no_number_is_refused(budget):
    with pytest.raises(ValueError, match="budget_gb must be a number of GiB") as caught:
        budget_bytes_of(budget, CPU)
    assert repr(budget) in str(caught.value)


def test_the_budget_of_the_device_needs_a_cuda_device():
    with pytest.raises(ValueError, match="needs a CUDA device, and the model is planned for cpu"):
        budget_bytes_of("device", CPU)


@pytest.fixture
def gpu(monkeypatch):
    """Stands for one CUDA device of 23.5 GiB, as a card of 24 GB has it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=47 * GIB // 2))


def test_a_budget_above_the_device_warns_with_both_numbers(gpu):
    with pytest.warns(UserWarning, match=r"budget of 24\.00 GiB is above the 23\.50 GiB that cuda has"):
        assert budget_bytes_of(24, torch.device("cuda")) == 24 * GIB


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("budget", "device"), [(23.5, "cuda"), (1, "cuda:0"), (24, "cpu"), (80, "cuda:1")], ids=repr)
def test_a_budget_within_the_device_or_for_one_that_is_not_there_does_not_warn(gpu, budget, device):
    assert budget_bytes_of(budget, torch.device(device)) == budget * GIB


@pytest.mark.filterwarnings("error")
def test_without_a_gpu_no_budget_warns(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    budget_bytes_of(10**6, torch.device("cuda"))


def test_the_budget_of_the_device_is_all_that_it_has(gpu, monkeypatch):
    assert budget_bytes_of("device", torch.device("cuda")) == 47 * GIB // 2
    with pytest.raises(ValueError, match="this machine has no cuda:1: pass a number of GiB"):
        budget_bytes_of("device", torch.device("cuda:1"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="this machine has no cuda: pass a number of GiB"):
        budget_bytes_of("device", torch.device("cuda"))


def test_the_planned_device_is_the_models_own_the_cpu_without_real_parameters_or_the_chosen_one():
    models = nn.Linear(2, 2), nn.Linear(2, 2, device="meta"), nn.Identity()
    assert [planning_device(model) for model in models] == [CPU] * 3
    assert planning_device(nn.Linear(2, 2), "cuda") == torch.device("cuda")


@pytest.mark.parametrize("device", ["gpu", "mps", "meta", "xpu:0", ["cpu"], torch.device("xpu")], ids=repr)
def test_a_device_that_cannot_be_planned_for_is_refused(device):
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got") as caught:
        planning_device(nn.Linear(2, 2), device)
    assert repr(device) in str(caught.value)


@pytest.mark.parametrize(("name", "value", "allowed"), BAD[:4], ids=lambda value: repr(value))
def test_the_public_functions_refuse_a_bad_value_before_they_touch_the_model(name, value, allowed):
    model = nn.Linear(8, 8)
    before = dict(vars(model))
    for function in (velora_fx.optimize, velora_fx.plan):
        with pytest.raises(ValueError, match=f"{name} must be"):
            function(model, 1, torch.zeros(2, 8), **{name: value})
    assert vars(model) == before


def test_the_functions_show_every_option_with_its_default():
    expected = {field.name: field.default for field in fields(Options)}
    for function in (velora_fx.optimize, velora_fx.plan):
        shown = inspect.signature(function).parameters
        own = {name: p.default for name, p in shown.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
        own.pop("device", None)
        assert own == expected


def test_an_unknown_option_is_refused_with_those_that_there_are():
    for function in (velora_fx.optimize, velora_fx.plan):
        with pytest.raises(TypeError, match=r"there is no option target: the options are method, compiled, "):
            function(nn.Linear(8, 8), 1, (torch.ones(2, 8),), target="eager")


def test_every_option_is_described():
    assert all(f"        {field.name}: " in str(velora_fx.optimize.__doc__) for field in fields(Options))


def test_whether_the_step_is_compiled_is_found_out():
    plain, compiled, block = nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))
    compiled.compile()
    block[0].compile()
    found = [with_compiled(Options(), model).compiled for model in (plain, compiled, block)]
    assert found == [False, True, True]
    assert with_compiled(Options(compiled=False), compiled).compiled is False
