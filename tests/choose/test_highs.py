"""Nothing that the solver writes in C reaches the terminal."""

from __future__ import annotations

import ctypes
import json
import os
from typing import Any

import pytest
import torch
from scipy import optimize

import velora_fx
from tests.helpers.toys import rows, stack
from velora_fx.choose.highs import silent_descriptors
from velora_fx.cli.main import main


@pytest.fixture
def talking(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A solver that writes to both descriptors and to C's buffers, and how often it ran."""
    solve, calls = optimize.milp, []

    def milp(*args: Any, **kwargs: Any) -> Any:
        calls.append("solved")
        os.write(1, b"HighsMipSolverData: a line of its own\n")
        os.write(2, b"HighsMipSolverData: another line\n")
        ctypes.CDLL(None).printf(b"HighsMipSolverData: a line that waits in a buffer\n")
        return solve(*args, **kwargs)

    monkeypatch.setattr(optimize, "milp", milp)
    return calls


def net() -> tuple[torch.nn.Module, Any]:
    """What the command plans for."""
    return stack(), rows(16, 64)


def budget_between() -> float:
    plan = velora_fx.plan(stack(), None, (rows(16, 64),), optimizer="none")
    return 0.8 * plan.planned.peak_bytes / 2**30


@pytest.mark.parametrize("options", [{}, {"objective": "speed"}], ids=["memory", "speed"])
def test_planning_prints_nothing(
    talking: list[str], options: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    print("before", end="")
    velora_fx.plan(stack(), budget_between(), (rows(16, 64),), optimizer="none", **options)
    print("after", end="")
    ctypes.CDLL(None).fflush(None)
    assert talking
    assert capfd.readouterr() == ("beforeafter", "")


def test_what_the_command_prints_is_json_alone(talking: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "tests.choose.test_highs:net", "--device", "cpu", "--optimizer", "none", "--json"]
    assert main([*arguments, "--budget-gb", str(budget_between())]) == 0
    ctypes.CDLL(None).fflush(None)
    assert talking
    assert json.loads(capfd.readouterr().out)["fits"]


def test_the_descriptors_are_put_back_after_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), silent_descriptors():
        os.write(1, b"lost")
        raise KeyError
    os.write(1, b"out")
    os.write(2, b"error")
    assert capfd.readouterr() == ("out", "error")
