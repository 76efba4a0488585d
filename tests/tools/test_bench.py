"""tools/bench as a command: its arguments, what it checks before it measures, and a run of the operators."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tools.commands import ROOT, assert_refused, ran
from tools.bench.main import finish, main
from tools.bench.numerics import (
    error_complaints,
    fold_complaints,
    operator_complaints,
    tiny_models,
    training_complaints,
)
from tools.bench.ops import OpCase, OpRow, _time, measure_op
from tools.bench.ops_table import op_tables
from tools.bench.timing import CPU_ROTATED_BYTES, timed, timed_steps, timing_of

SMALL = OpCase(64, 64, 32, "float32", 16)


def test_the_help_teaches_with_examples_and_shows_no_path_of_this_machine() -> None:
    done = ran("bench", "step", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "examples:" in done.stdout and "exit codes:" in done.stdout and "velora-compiled-all" in done.stdout
    assert "(default: tools/results)" in done.stdout and str(ROOT) not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("", "ops|step|lora|full7b|plan|overhead|prepare"),
        ("speed", "invalid choice"),
        ("ops --rows dX", "--rows must be some of compress,expand,fold,dW, got 'dX'"),
        ("ops --repeats many", "--repeats"),
        ("step --device cpu --models llama", "--models must be some of llama-cpu, got 'llama'"),
        ("step --batch-size 0", "--batch-size must be at least 1, got 0"),
        ("lora --sub-token-size 1", "--sub-token-size must be at least 2, got 1"),
        ("full7b --steps 5", "--steps must be at least 6, got 5"),
        ("full7b --budget-gb 0", "--budget-gb must be a positive number of GiB, got 0"),
        ("full7b --budget-gb nan", "--budget-gb must be a positive number of GiB, got nan"),
        ("full7b --device cpu --models llama-7b", "--models must be some of llama-cpu,llama-tiny, got 'llama-7b'"),
        ("full7b --rows eager", "--rows must be some of velora-8,adamw-whole-card,"),
        ("full7b --minutes nan", "--minutes must be at least 0, got nan"),
        ("prepare --of ops", "--of must be some of full7b,step,lora, got 'ops'"),
        (
            "prepare --of lora --models llama-7b",
            "--models must be some of llama-1b,llama-350m,llama-130m, got 'llama-7b'",
        ),
        ("full7b --quick", "unrecognized arguments: --quick"),
        ("full7b --sub-token-size 8", "unrecognized arguments: --sub-token-size 8"),
    ],
)
def test_bad_input_is_refused_with_code_2(arguments: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(main, arguments.split(), capsys, complaint)


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    assert_refused(main, ["lora"], capsys, 'pip install "peft>=')


@pytest.mark.parametrize("place", ["file", "file/folder", "taken"])
def test_results_that_cannot_be_written_are_refused_before_measuring(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "ops.jsonl").mkdir(parents=True)
    folder = str(tmp_path / place)
    assert_refused(main, ["ops", "--results", folder], capsys, "--results must be a folder for files of rows", folder)


def test_operators_are_checked_timed_and_written_without_transformers(tmp_path: Path) -> None:
    arguments = ["ops", "--device", "cpu", "--quick", "--repeats", "1", "--results", str(tmp_path)]
    code = f"import sys; sys.modules['transformers'] = None; from tools.bench.main import main; exit(main({arguments}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "ops.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(row["operator"] for row in rows)) == ["compress", "expand", "fold", "dW"]
    assert all(row["header"]["torch"] and row["error"] is None and row["ours"]["repeats"] == 1 for row in rows)
    assert rows[0]["bytes"] == 4 * 1024 * (768 + 24)  # x and z in float32
    assert all(row["over_bound"] > 0 and row["rebuilt_by"] == "x̂ rebuilt (no PEFT here)" for row in rows[-4:])
    assert done.stdout.startswith("command") and "| dW " in done.stdout.splitlines()[-1]


def test_the_rebuilt_product_is_pefts_own() -> None:
    pytest.importorskip("peft.tuners.lora.velora")
    row = measure_op(OpRow("dW", "cpu", SMALL, 1e10, 2))
    assert (row.error, row.rebuilt_by) == (None, "PEFT")


def test_right_operators_have_no_complaints() -> None:
    assert operator_complaints([SMALL], "cpu") == fold_complaints("cpu") == []


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_a_wrong_result_has_a_complaint(factor: float) -> None:
    right = torch.linspace(-1, 1, 9)
    assert error_complaints("compress", right, right, 1e-5) == []
    (complaint,) = error_complaints("compress", right * factor, right, 1e-5)
    assert complaint.startswith("compress: relative error ")


@pytest.mark.parametrize("adapter", ["", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_training_step_has_a_complaint_for_each_wrong_gradient_and_where_nothing_is_compressed(adapter: str) -> None:
    models = tiny_models("cpu", adapter)
    assert training_complaints(*deepcopy(models)) == []
    dense, model, batch = models
    untouched = training_complaints(deepcopy(dense), deepcopy(dense), batch)
    assert untouched == ["nothing of a tiny Llama was compressed"]
    end = "q_proj.lora_A.default.weight" if adapter else "q_proj.weight"
    wrong = [name for name, _ in model.named_parameters() if name.endswith(end)]
    for name in wrong:
        model.get_parameter(name).register_hook(lambda grad: grad * 1.1)  # type: ignore[no-untyped-call]
    complaints = training_complaints(dense, model, batch)
    assert len(complaints) == len(wrong) == 2
    for name, complaint in zip(wrong, complaints, strict=True):
        assert complaint.startswith(f"compressed gradient of {name} ")


def test_a_failed_row_is_told_in_full_before_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    error = "OutOfMemoryError: all of it, and then some more than fits into a cell of the table"
    row = OpRow("dW", "cpu", SMALL, 1e10, 2, error=error)
    assert finish([row], op_tables([row])) == 1
    printed = capsys.readouterr()
    assert f"failed: dW, 64 x 64, M = 16: {error}" in printed.err
    assert printed.out.splitlines()[-1].startswith("| dW")


def test_timings_are_medians_with_the_distance_between_the_quartiles() -> None:
    timing = timing_of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (timing.median_seconds, timing.min_seconds, timing.spread_seconds, timing.repeats) == (3.0, 1.0, 2.0, 5)


def test_inputs_are_taken_in_turn() -> None:
    taken: list[int] = []
    calls = [lambda number=number: taken.append(number) for number in range(3)]
    timed(calls, "cpu", repeats=4, warm_up=2)
    assert taken == [0, 1, 2, 0, 1, 2]


def test_training_steps_on_a_cpu_are_timed_one_by_one_after_one_that_does_not_count() -> None:
    steps: list[None] = []
    assert timed_steps(lambda: steps.append(None), "cpu", 3).repeats == 3
    assert len(steps) == 3 + 1


def test_results_of_operators_are_kept_until_they_fill_the_cache() -> None:
    """Freed at once, their memory would be written again while it is cached."""
    kept = 4
    places: list[int] = []

    def contender(x: Tensor) -> Tensor:
        result = x.new_empty(CPU_ROTATED_BYTES // kept, dtype=torch.uint8)
        places.append(result.data_ptr())
        return result

    _time(OpRow("expand", "cpu", SMALL, 1e10, 12), [contender], [(torch.ones(1),)])
    assert all(len(set(places[start : start + kept])) == kept for start in range(1, len(places) - kept))


def test_the_overhead_of_eager_calls_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["overhead", "--device", "cpu", "--quick", "--repeats", "2", "--rows", "toy", "--results", str(tmp_path)]
    assert main(given) == 0
    rows = [json.loads(line) for line in (tmp_path / "overhead.jsonl").read_text().splitlines()]
    assert [(row["model"], row["tokens"], row["blocks"]) for row in rows] == [("toy", 16, 8), ("toy", 2048, 8)]
    assert all(row["forward"]["median_seconds"] > 0 for row in rows)
    assert "ms more for each block" in capsys.readouterr().out


def test_the_time_of_a_plan_is_measured(tmp_path: Path) -> None:
    assert main(["plan", "--rows", "toy-2", "--results", str(tmp_path)]) == 0
    (row,) = [json.loads(line) for line in (tmp_path / "plan.jsonl").read_text().splitlines()]
    assert row["seconds"] > 0 and row["error"] is None
