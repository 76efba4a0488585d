"""Plans for several budgets at once: the same as one at a time, in one table."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import velora_fx
from tests.helpers.toys import rows, stack
from velora_fx.cli.main import main
from velora_fx.cli.sweep import render_sweep, sweep
from velora_fx.options import Options

BATCH = (rows(64, 64, 64),)
OPTIONS = Options(optimizer="sgd")


@pytest.fixture(scope="module")
def budgets() -> tuple[float, ...]:
    """In GiB: too little, half of the way, and enough."""
    with pytest.raises(velora_fx.BudgetError) as raised:
        velora_fx.plan(stack(width=64), 1e-9, BATCH, optimizer="sgd")
    smallest, untouched = raised.value.smallest_peak_bytes, raised.value.plan.baseline.peak_bytes
    return (0.9 * smallest / 2**30, (smallest + untouched) / 2**31, 1.1 * untouched / 2**30)


@pytest.fixture(scope="module")
def plans(budgets: tuple[float, ...]) -> tuple[velora_fx.Plan, ...]:
    return sweep(stack(width=64), budgets, BATCH, {}, OPTIONS, torch.device("cpu"), "stack")


def test_each_plan_is_the_one_for_its_budget_alone(
    plans: tuple[velora_fx.Plan, ...], budgets: tuple[float, ...]
) -> None:
    assert [plan.fits for plan in plans] == [False, True, True]
    alone = velora_fx.plan(stack(width=64), budgets[1], BATCH, optimizer="sgd")
    assert replace(alone, model="stack") == plans[1]


def test_the_table_has_a_row_for_each_budget(plans: tuple[velora_fx.Plan, ...]) -> None:
    table = render_sweep(plans)
    cells = [line.split("  ") for line in table.splitlines()[2:5]]
    assert [[cell.strip() for cell in row if cell.strip()][1] for row in cells] == ["NO", "yes", "yes"]
    compressed = sum(len(decision.consumers) for decision in plans[1].compressed)
    total = sum(len(decision.consumers) for decision in plans[1].decisions) + len(plans[1].skipped)
    assert f" {compressed}/{total} " in table.splitlines()[3]
    assert "yes, as it is" in table.splitlines()[4]
    assert "untouched: " in table.splitlines()[-1]


def factory() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """A model and its inputs, for the command line."""
    return stack(width=64), BATCH


ARGUMENTS = ["--model", "tests.cli.test_sweep:factory", "--device", "cpu", "--optimizer", "sgd"]


def test_the_command_line_prints_the_table_or_json_and_exits_by_the_smallest_budget(
    budgets: tuple[float, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ",".join(map(str, budgets))
    assert main([*ARGUMENTS, "--sweep", wanted, "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert [plan["fits"] for plan in data] == [False, True, True]
    assert main([*ARGUMENTS, "--sweep", str(budgets[2])]) == 0
    assert "yes, as it is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sweep", ""], "--sweep needs budgets"),
        (["--sweep", ","], "--sweep needs budgets"),
        (["--sweep", "1,x"], "must be a number of GiB"),
        (["--sweep", "1,0"], "must be a positive number"),
        (["--sweep", "1", "--budget-gb", "1"], "leave out --budget-gb"),
        (["--sweep", "1", "--plot", "x.svg", "--save", "x.json"], "leave out --plot, --save"),
    ],
)
def test_bad_sweeps_are_refused(more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS, *more]) == 2
    assert message in capsys.readouterr().err
