"""tools/accuracy.py: predicted peaks are the measured ones for two models, and what it prints when all is not well."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools"
PLANS = ("nothing", "half", "all")


@pytest.fixture(scope="module")
def tool() -> Any:
    """The tool as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        yield importlib.import_module("accuracy")


def row(tool: Any, predicted: int = 1000, measured: int = 1000, **fields: Any) -> Any:
    """A measurement with figures."""
    made = tool.Row("llama", "cpu", "eager", "nothing", 2, 64, predicted_bytes=predicted, measured_bytes=measured)
    return replace(made, **fields)


@pytest.fixture(scope="module")
def of_a_small_model(tool: Any) -> dict[str, Any]:
    """The three plans of a model without attention, in eager steps."""
    return {plan: tool.measure(tool.Row("mlp", "cpu", "eager", plan, 512, None)) for plan in PLANS}


@pytest.fixture(scope="module")
def of_a_transformer(tool: Any) -> dict[str, Any]:
    """The three plans of a model in eager steps."""
    return {plan: tool.measure(tool.Row("llama", "cpu", "eager", plan, 4, 128)) for plan in PLANS}


@pytest.fixture(scope="module")
def of_a_compiled_model(tool: Any) -> dict[str, Any]:
    """The three plans of a model that compiles quickly, in compiled steps."""
    measured = {}
    for plan in PLANS:
        torch.compiler.reset()
        measured[plan] = tool.measure(tool.Row("mlp", "cpu", "inductor", plan, 4096, None))
    return measured


models = pytest.mark.parametrize(
    "found",
    [
        "of_a_small_model",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("of_a_transformer", "of_a_compiled_model")),
    ],
)


@models
def test_predicted_peaks_are_the_measured_ones(found: str, request: pytest.FixtureRequest) -> None:
    rows = request.getfixturevalue(found)
    for measured in rows.values():
        assert measured.error is None
        assert abs(measured.difference) <= 0.003


@models
def test_the_plans_compress_nothing_a_part_and_all_and_measured_peaks_fall(
    found: str, request: pytest.FixtureRequest
) -> None:
    nothing, half, tightest = (request.getfixturevalue(found)[plan] for plan in PLANS)
    assert nothing.num_compressed == 0 < half.num_compressed
    assert tightest.num_compressed == tightest.num_candidates >= half.num_compressed
    assert tightest.measured_bytes <= half.measured_bytes < nothing.measured_bytes
    middle = (nothing.measured_bytes + tightest.measured_bytes) / 2
    assert half.measured_bytes <= 1.01 * middle


@pytest.mark.slow
def test_the_command_prints_the_table_and_the_worst_difference_last(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    arguments = ("--models", "mlp", "--targets", "eager", "--plans", "nothing", "--batch-size", "512", "--markdown")
    command = [sys.executable, str(TOOLS / "accuracy.py"), *arguments, "--json", str(file)]
    paths = os.pathsep.join([str(TOOLS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
    assert "| mlp" in done.stdout and "nothing: predicted / measured MiB" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("eager: worst |predicted - measured| / measured 0.")
    assert done.stderr == ""
    (figures,) = json.loads(file.read_text())["rows"]
    assert (figures["model"], figures["batch_size"], figures["error"]) == ("mlp", 512, None)
    assert figures["difference"] == (figures["predicted_bytes"] - figures["measured_bytes"]) / figures["measured_bytes"]


def test_a_model_that_fails_says_why_in_its_row(tool: Any) -> None:
    failed = tool.measure(tool.Row("bert", "cpu", "eager", "nothing", 1, 1024))  # it has 512 positions
    assert failed.error is not None and "512" in failed.error
    assert "failed" not in tool.table([failed], "simple") and failed.error[:20] in tool.table([failed], "simple")


class Deadly:
    """Ends the process in which it arrives."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (1,)


def test_a_process_that_dies_takes_only_its_own_row_with_it(tool: Any) -> None:
    assert tool.measure_apart(row(tool, model=Deadly())).error == "its process died"


@pytest.mark.parametrize(
    ("found", "code", "last"),
    [
        ({"predicted": 1020}, 0, "2.00% (llama, nothing), within 2%"),
        ({"predicted": 1021}, 1, "2.10% (llama, nothing), exceeds 2%"),
        ({"predicted": 979}, 1, "2.10% (llama, nothing), exceeds 2%"),
        ({"predicted": 1030, "target": "inductor"}, 0, "3.00% (llama, nothing), within 3%"),
        ({"predicted": 1011, "device": "cuda"}, 1, "1.10% (llama, nothing), exceeds 1%"),
        ({"error": "ValueError: no"}, 1, "failed: llama, eager, nothing: ValueError: no"),
    ],
    ids=str,
)
def test_the_exit_code_is_1_for_a_failure_or_a_difference_beyond_the_bound(
    tool: Any, found: dict[str, Any], code: int, last: str, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(tool, "measure_apart", lambda asked: row(tool, **found))
    assert tool.main(["--models", "llama", "--targets", "eager", "--plans", "nothing"]) == code
    assert capsys.readouterr().out.splitlines()[-1].endswith(last)


def test_the_worst_of_several_is_named_for_each_target(tool: Any) -> None:
    rows = [row(tool, 1001), row(tool, 985, plan="half"), row(tool, 1002, target="inductor", model="gpt2")]
    eager, inductor = tool.worst(rows)
    assert eager.startswith("eager: ") and "1.50% (llama, half)" in eager
    assert inductor.startswith("inductor: ") and "0.20% (gpt2, nothing)" in inductor


def test_a_line_of_the_table_has_a_cell_for_each_plan(tool: Any) -> None:
    mib = 2**20
    rows = [row(tool, 2 * mib, mib), row(tool, mib, mib, plan="all")]
    *_, line = tool.table(rows, "github").splitlines()
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["llama", "2 x 64", "eager", "2.0 / 1.0 (+100.00%)", "1.0 / 1.0 (+0.00%)"]


def test_cells_of_a_gpu_also_compare_the_reserved_memory(tool: Any) -> None:
    mib = 2**20
    measured = row(tool, mib, mib, device="cuda", predicted_reserved_bytes=3 * mib, reserved_bytes=2 * mib)
    assert tool.table([measured], "simple").endswith("1.0 / 1.0 (+0.00%), with overhead / reserved 3.0 / 2.0")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--models", "llama,lama"], "--models must be some of llama,qwen3"),
        (["--targets", "jit"], "--targets must be some of eager,inductor, got 'jit'"),
        (["--plans", ""], "--plans must be some of nothing,half,all, got ''"),
        (["--device", "tpu"], "--device"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--seq-len", "-3"], "--seq-len must be at least 1, got -3"),
        (["--seq-len", "long"], "--seq-len"),
        (["--json", "/nowhere/at/all.json"], "there is no folder /nowhere/at"),
        (["--speed"], "unrecognized arguments: --speed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_with_code_2_before_anything_is_measured(
    tool: Any, arguments: list[str], complaint: str, capsys: Any
) -> None:
    with pytest.raises(SystemExit) as left:
        tool.main(arguments)
    assert left.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tool: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit) as left:
        tool.main(["--device", "cuda"])
    assert left.value.code == 2
    assert "needs a GPU that PyTorch can use" in capsys.readouterr().err


def test_sizes_that_are_asked_for_replace_the_models_own_where_there_are_any(tool: Any) -> None:
    asked = tool.asked_for(tool.parse(["--models", "llama,vit", "--batch-size", "3", "--seq-len", "32"]))
    assert {(measured.model, measured.batch_size, measured.length) for measured in asked} == {
        ("llama", 3, 32),
        ("vit", 3, None),
    }
    assert len(asked) == 2 * 2 * 3


@pytest.mark.parametrize("name", ["llama-350m-60g", "vit-b-60g"])
def test_models_for_a_gpu_have_the_shape_of_the_presets(tool: Any, name: str) -> None:
    case = tool.CASES["cuda"][name]
    with torch.device("meta"):
        model = case.make()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert 0.9 < count / {"llama-350m-60g": 368e6, "vit-b-60g": 86.6e6}[name] < 1.1


def test_the_help_teaches_with_examples() -> None:
    command = [sys.executable, str(TOOLS / "accuracy.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "examples:" in done.stdout and "exit codes:" in done.stdout and "whisper" in done.stdout
