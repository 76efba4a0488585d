"""tools/finetune.py at a tiny size: both runs learn, and the memory is the predicted one."""

from __future__ import annotations

import json
import math
import subprocess
from typing import Any

import pytest
import torch

from tests.tools import commands
from tools import finetune

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
TINY = ("--layers", "2", "--heads", "1", "--seq-len", "64", "--batch-size", "8")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """A run of 20 steps: what it printed, and what it wrote."""
    file = tmp_path_factory.mktemp("finetune") / "run.json"
    done = commands.ran("finetune.py", *TINY, "--steps", "20", "--json", str(file))
    assert done.returncode == 0, done.stderr
    return done, json.loads(file.read_text())


@pytest.mark.slow
def test_both_runs_learn_from_the_same_start(ran: tuple[Any, dict[str, Any]]) -> None:
    runs = ran[1]["dense"], ran[1]["velora"]
    assert runs[0]["losses"][0] == runs[1]["losses"][0]
    assert runs[0]["losses"][1:] != runs[1]["losses"][1:]
    assert runs[0]["held_out"][0] == runs[1]["held_out"][0]
    for run in runs:
        assert len(run["losses"]) == 20
        assert all(map(math.isfinite, [*run["losses"], *run["held_out"]]))
        assert run["losses"][0] == pytest.approx(math.log(256), abs=0.2)
        assert run["losses"][-1] < run["losses"][0] - 0.5
        assert run["held_out"][1] < run["held_out"][0] - 0.5


@pytest.mark.slow
def test_memory_is_as_predicted_and_within_the_budget(ran: tuple[Any, dict[str, Any]]) -> None:
    plan = ran[1]["plan"]
    (dense,), (velora,) = ran[1]["dense"]["peaks"], ran[1]["velora"]["peaks"]
    assert dense == pytest.approx(plan["baseline"]["peak_bytes"], rel=0.01)
    assert velora == pytest.approx(plan["planned"]["peak_bytes"], rel=0.01)
    assert velora <= plan["budget_bytes"] < dense
    assert velora < 0.95 * dense
    assert {"compress", "keep"} == {decision["action"] for decision in plan["decisions"]}


@pytest.mark.slow
def test_output_is_the_plan_and_both_runs_side_by_side(ran: tuple[Any, dict[str, Any]]) -> None:
    done, found = ran
    assert done.stderr == ""
    rows = {line[:30].strip(): line[30:].split() for line in done.stdout.splitlines()}
    assert rows["learning rate"] == ["0.001", "0.002"]
    assert rows["held-out loss after"] == [f"{found[run]['held_out'][1]:.4f}" for run in ("dense", "velora")]
    assert rows["peak measured, MiB"] == [f"{found[run]['peaks'][0] / 2**20:.1f}" for run in ("dense", "velora")]
    assert "fits" in done.stdout and "compress M=" in done.stdout
    assert "the forward is exact: True" in done.stdout


def test_an_impossible_budget_ends_with_one_line_that_says_what_is_possible(capsys: Any) -> None:
    assert finetune.main([*TINY, "--budget-gb", "0.001"]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("finetune.py: no plan fits 1.02 MiB: the smallest peak that can be reached is")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--steps 1", "--steps must be at least 2, got 1"),
        ("--heads 0", "--heads must be at least 1, got 0"),
        pytest.param("--device cuda", "--device cuda needs a GPU", marks=without_gpu),
    ],
)
def test_bad_arguments_are_named(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    commands.assert_refused(finetune.main, arguments.split(), capsys, message)
