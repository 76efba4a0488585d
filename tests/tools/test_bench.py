"""tools/bench.py: what it measures is true, wrong operators are never timed, and failures are told in their rows."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TOOLS
from velora_fx.ops import velora as ops


@pytest.fixture
def small_cases(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators of one small size."""
    case = tools.bench_ops.OpCase(64, 64, 32, "float32", 16)
    monkeypatch.setattr(tools.bench, "op_cases", lambda device, quick: [case])
    monkeypatch.setattr(tools.bench, "copy_bandwidth", lambda device, repeats: 1e10)
    monkeypatch.setattr(tools.bench_timing, "CPU_ROTATED_BYTES", 2**16)


def rows_in(file: Path) -> list[dict[str, Any]]:
    """The rows of a file for machines."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_operators_are_checked_timed_and_written(tools: Any, small_cases: None, tmp_path: Path, capsys: Any) -> None:
    assert tools.bench.main(["ops", "--device", "cpu", "--repeats", "3", "--results", str(tmp_path)]) == 0
    rows = rows_in(tmp_path / "ops.jsonl")
    assert [row["operator"] for row in rows] == ["compress", "expand", "fold", "dW"]
    assert all(row["header"]["torch"] and row["error"] is None and row["ours"]["repeats"] == 3 for row in rows)
    assert rows[0]["bytes"] == 4 * 64 * (64 + 4)
    bound = max(rows[3]["dense"]["median_seconds"] / 16, 4 * 64 * (32 + 4) / 1e10) + 4 * 32 * 64 / 1e10
    assert rows[3]["bound_seconds"] == pytest.approx(bound)
    assert rows[3]["over_bound"] == pytest.approx(rows[3]["ours"]["median_seconds"] / bound)
    printed = capsys.readouterr().out
    assert printed.startswith("command") and "| dW " in printed.splitlines()[-1]


@pytest.mark.parametrize("operator", ["compress", "expand", "linear"])
def test_wrong_operators_are_never_timed(
    tools: Any, small_cases: None, operator: str, monkeypatch: Any, tmp_path: Path, capsys: Any
) -> None:
    right = getattr(ops, operator)
    if operator == "linear":  # its gradient is wrong then
        wrong: Any = lambda x, weight, *more: right(x, weight * 1.1, *more)  # noqa: E731
    else:
        wrong = lambda *taken: right(*taken) * 1.1  # noqa: E731
    monkeypatch.setattr(ops, operator, wrong)
    assert tools.bench.main(["ops", "--device", "cpu", "--results", str(tmp_path)]) == 1
    assert "the operators are wrong on this device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("result", [float("nan"), None], ids=["nan", "an error"])
def test_operators_that_give_no_numbers_are_wrong(
    tools: Any, small_cases: None, result: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    right = ops.compress
    monkeypatch.setattr(ops, "compress", lambda x, v: right(x, v) * result)
    assert tools.bench.main(["ops", "--device", "cpu", "--results", str(tmp_path)]) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def tiny_models(tools: Any) -> Any:
    """What the numerics check runs, prepared once for each adapter."""
    return cache(tools.bench_numerics.tiny_models)


ADAPTERS = pytest.mark.parametrize("adapter", ["", pytest.param("lora", marks=pytest.mark.slow)])


@ADAPTERS
def test_right_training_steps_have_no_complaints(tools: Any, tiny_models: Any, adapter: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(tools.bench_numerics, "tiny_models", lambda *asked: deepcopy(tiny_models(*asked)))
    assert tools.bench_numerics.training_complaints("cpu", adapter) == []


@ADAPTERS
def test_wrong_training_steps_are_never_timed(
    tools: Any, tiny_models: Any, adapter: str, monkeypatch: Any, tmp_path: Path, capsys: Any
) -> None:
    right = ops.compress_blocks  # what compress runs on CPU
    monkeypatch.setattr(tools.bench_numerics, "tiny_models", lambda *asked: deepcopy(tiny_models(*asked)))
    monkeypatch.setattr(ops, "compress_blocks", lambda *taken: right(*taken) * 1.1)
    assert tools.bench.main([adapter or "step", "--device", "cpu", "--results", str(tmp_path)]) == 1
    complaints = capsys.readouterr().err
    assert "compressed gradient of " in complaints and f"{adapter}_A" * bool(adapter) in complaints
    assert list(tmp_path.iterdir()) == []


def test_a_failed_row_is_told_before_the_table_and_written(
    tools: Any, monkeypatch: Any, tmp_path: Path, capsys: Any
) -> None:
    error = "OutOfMemoryError: all of it, and then some more than fits into a cell of the table"
    monkeypatch.setattr(tools.bench, "complaints_of", lambda args: [])
    monkeypatch.setattr(tools.bench, "measure_apart", lambda row: replace(row, error=error))
    assert tools.bench.main(["step", "--device", "cpu", "--rows", "eager,compile", "--results", str(tmp_path)]) == 1
    rows = rows_in(tmp_path / "step.jsonl")
    assert [(row["name"], row["error"]) for row in rows] == [("eager", error), ("compile", error)]
    printed = capsys.readouterr()
    assert f"failed: llama-cpu, compile: {error}" in printed.err
    assert printed.out.splitlines()[-1].startswith("| llama-cpu")


def test_a_failed_operator_is_told_before_the_table(
    tools: Any, small_cases: None, monkeypatch: Any, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(tools.bench, "complaints_of", lambda args: [])
    monkeypatch.setattr(tools.bench, "measure_op", lambda row: replace(row, error="OutOfMemoryError: all of it"))
    assert tools.bench.main(["ops", "--device", "cpu", "--rows", "dW", "--results", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "failed: dW, 64 x 64, M = 16: OutOfMemoryError" in printed.err
    assert printed.out.splitlines()[-1].startswith("| dW")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "ops|step|lora|full7b"),
        (["speed"], "invalid choice"),
        (["ops", "--rows", "dX"], "--rows must be some of compress,expand,fold,dW, got 'dX'"),
        (["step", "--device", "cpu", "--models", "llama"], "--models must be some of llama-cpu, got 'llama'"),
        (["step", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["lora", "--sub-token-size", "1"], "--sub-token-size must be at least 2, got 1"),
        (["ops", "--repeats", "many"], "--repeats"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_with_code_2(tools: Any, arguments: list[str], complaint: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as left:
        tools.bench.main(arguments)
    assert left.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("benchmark", "package"), [("lora", "peft"), ("lora", "transformers"), ("step", "transformers")]
)
def test_a_missing_package_says_what_to_install(
    tools: Any, benchmark: str, package: str, monkeypatch: Any, capsys: Any
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    monkeypatch.setattr(tools.bench, "header_of", None)  # nothing begins
    with pytest.raises(SystemExit) as left:
        tools.bench.main([benchmark])
    assert left.value.code == 2
    assert f'pip install "{package}>=' in capsys.readouterr().err


def test_operators_are_timed_without_transformers(
    tools: Any, small_cases: None, monkeypatch: Any, tmp_path: Path
) -> None:
    cases, mib = tools.bench.op_cases, tools.bench_timing.CPU_ROTATED_BYTES
    for name in [name for name in sys.modules if name.startswith(("bench", "accuracy", "transformers.", "peft"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)  # so that importing it fails
    bench, timing = importlib.import_module("bench"), importlib.import_module("bench_timing")
    monkeypatch.setattr(bench, "op_cases", cases)
    monkeypatch.setattr(timing, "CPU_ROTATED_BYTES", mib)
    assert bench.main(["ops", "--device", "cpu", "--repeats", "2", "--results", str(tmp_path)]) == 0
    assert rows_in(tmp_path / "ops.jsonl")[3]["rebuilt_by"] == "x̂ rebuilt (no PEFT here)"


@pytest.mark.parametrize("place", ["file", "file/folder", "taken"])
def test_results_that_cannot_be_written_are_refused_before_measuring(
    tools: Any, place: str, monkeypatch: Any, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(tools.bench, "header_of", None)  # nothing begins
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "ops.jsonl").mkdir(parents=True)
    with pytest.raises(SystemExit) as left:
        tools.bench.main(["ops", "--results", str(tmp_path / place)])
    assert left.value.code == 2
    printed = capsys.readouterr()
    assert "--results must be a folder for files of rows" in printed.err and str(tmp_path / place) in printed.err
    assert printed.out == ""


def test_the_help_shows_no_path_of_this_machine(tools: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        tools.bench.main(["step", "--help"])
    printed = capsys.readouterr().out
    assert "(default: tools/results)" in printed and str(TOOLS) not in printed


def test_the_help_teaches_with_examples() -> None:
    command = [sys.executable, str(TOOLS / "bench.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "examples:" in done.stdout and "exit codes:" in done.stdout and "velora-compiled-all" in done.stdout
