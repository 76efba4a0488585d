"""Every bad value is refused with what was got and what is allowed."""

from __future__ import annotations

import inspect
import math
import warnings
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import velora_fx
from velora_fx.options import GIB, Options, budget_bytes_of, planning_device
from velora_fx.session import with_compiled

CPU = torch.device("cpu")
BAD: tuple[tuple[str, Any, str], ...] = (
    ("method", "velora", "'auto' or 'compress' or 'exact'"),
    ("compiled", "inductor", "True, 'blocks', False or None"),
    ("compiled", 1, "True, 'blocks', False or None"),
    ("gradients", "factored?", "'dense'"),
    ("projection", "random", "'signs' or 'batch_mean'"),
    ("projection", ["signs"], "'signs' or 'batch_mean'"),
    ("sub_token_sizes", (), "integers of at least 2"),
    ("sub_token_sizes", 32, "integers of at least 2"),
    ("sub_token_sizes", "32", "integers of at least 2"),
    ("sub_token_sizes", 32.0, "integers of at least 2"),
    ("sub_token_sizes", (16, 1), "integers of at least 2"),
    ("sub_token_sizes", (0,), "integers of at least 2"),
    ("sub_token_sizes", (-4,), "integers of at least 2"),
    ("sub_token_sizes", (16, 32.0), "integers of at least 2"),
    ("sub_token_sizes", (True,), "integers of at least 2"),
    ("gradient_accumulation", 0, "at least 1"),
    ("gradient_accumulation", 2.0, "at least 1"),
    ("gradient_accumulation", True, "at least 1"),
    ("seed", 1.0, "an integer"),
    ("seed", None, "an integer"),
    ("seed", True, "an integer"),
    ("filter_fn", "lm_head", "filter_fn(module, name)"),
    ("loss_fn", 1.0, "loss_fn"),
)
GOOD: tuple[tuple[str, Any], ...] = (
    ("gradient_accumulation", 8),
    ("method", "exact"),
    ("compiled", True),
    ("compiled", None),
    ("gradients", "dense"),
    ("projection", "signs"),
    ("projection", "batch_mean"),
    ("sub_token_sizes", None),
    ("sub_token_sizes", [2]),
    ("sub_token_sizes", (32, 16, 32)),
    ("seed", -(2**80)),
)


@pytest.mark.parametrize(("name", "value", "allowed"), BAD, ids=lambda value: repr(value))
def test_a_bad_value_is_named_with_what_is_allowed(name, value, allowed):
    with pytest.raises(ValueError) as caught:
        Options(**{name: value})
    message = str(caught.value)
    assert message.startswith(name) and allowed in message
    assert f"got {value!r}" in message


@pytest.mark.parametrize(("name", "value"), GOOD, ids=lambda value: repr(value))
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


def test_options_cannot_be_changed_after_the_check():
    with pytest.raises(AttributeError):
        Options().seed = 1.5  # type: ignore[misc]


def test_options_are_given_by_name():
    with pytest.raises(TypeError):
        Options("adamw")  # type: ignore[misc]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.floats(1e-6, 1e6) | st.integers(1, 10**6))
def test_a_budget_is_in_units_of_two_to_the_thirty_bytes(budget):
    got = budget_bytes_of(budget, CPU)
    assert isinstance(got, int)
    assert got <= budget * GIB < got + 1


@pytest.mark.parametrize("budget", ["1", "1GiB", " 1 GiB", "1.0"])
def test_a_budget_may_be_text_with_its_unit(budget):
    assert budget_bytes_of(budget, CPU) == GIB


@pytest.mark.parametrize("budget", [np.float32(1), np.float64(1), np.int64(1)], ids=repr)
def test_a_budget_may_be_a_number_of_numpy(budget):
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


@pytest.mark.parametrize(("budget", "device"), [(23.5, "cuda"), (1, "cuda:0"), (24, "cpu"), (80, "cuda:1")], ids=repr)
def test_a_budget_within_the_device_or_for_one_that_is_not_there_does_not_warn(gpu, budget, device):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert budget_bytes_of(budget, torch.device(device)) == budget * GIB


def test_without_a_gpu_no_budget_warns(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        budget_bytes_of(10**6, torch.device("cuda"))


def test_the_budget_of_the_device_is_all_that_it_has(gpu, monkeypatch):
    assert budget_bytes_of("device", torch.device("cuda")) == 47 * GIB // 2
    with pytest.raises(ValueError, match="this machine has no cuda:1: pass a number of GiB"):
        budget_bytes_of("device", torch.device("cuda:1"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="this machine has no cuda: pass a number of GiB"):
        budget_bytes_of("device", torch.device("cuda"))


def test_the_planned_device_is_the_models_own_by_default():
    assert planning_device(nn.Linear(2, 2)) == CPU


@pytest.mark.parametrize("model", [nn.Linear(2, 2, device="meta"), nn.Identity()], ids=["meta", "no parameters"])
def test_a_model_without_real_parameters_is_planned_for_the_cpu(model):
    assert planning_device(model) == CPU


def test_the_planned_device_can_be_chosen():
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
