"""tools/accuracy: predicted peaks are the measured ones for two models, and what it prints when all is not well."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tools.commands import assert_refused, ran
from tools.accuracy.main import asked_for, main, parse
from tools.accuracy.measure import PLANS, measure
from tools.accuracy.models import CASES
from tools.accuracy.table import Row, is_within, spread, table, worst

MIB = 2**20
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def row(predicted: int = 1000, measured: int = 1000, **fields: Any) -> Row:
    """A measurement with figures."""
    made = Row("llama", "cpu", "eager", "nothing", 2, 64, predicted_bytes=predicted, measured_bytes=measured)
    return replace(made, **fields)


@pytest.mark.parametrize(
    ("model", "target", "batch_size", "length"),
    [
        ("mlp", "eager", 512, None),
        pytest.param("llama", "eager", 4, 128, marks=pytest.mark.slow),
        pytest.param("mlp", "inductor", 4096, None, marks=pytest.mark.slow),
    ],
)
def test_plans_compress_nothing_a_part_and_all_and_their_peaks_are_the_measured_ones(
    model: str, target: str, batch_size: int, length: int | None
) -> None:
    rows = []
    for plan in PLANS:
        torch.compiler.reset()
        rows.append(measure(Row(model, "cpu", target, plan, batch_size, length)))
    assert [measured.error for measured in rows] == [None] * 3
    assert all(abs(measured.difference) <= 0.003 for measured in rows)
    nothing, half, tightest = rows
    assert nothing.num_compressed == 0 < half.num_compressed
    assert tightest.num_compressed == tightest.num_candidates >= half.num_compressed
    assert tightest.measured_bytes <= half.measured_bytes < nothing.measured_bytes
    assert half.measured_bytes <= 1.01 * (nothing.measured_bytes + tightest.measured_bytes) / 2


@pytest.mark.slow
def test_the_command_prints_the_table_and_the_worst_difference_last(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    arguments = "--models mlp --targets eager --plans nothing --batch-size 512 --markdown --json"
    done = ran("accuracy", *arguments.split(), str(file))
    assert (done.returncode, done.stderr) == (0, "")
    assert "| mlp" in done.stdout and "nothing: predicted / measured MiB" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("eager: worst |predicted - measured| / measured 0.")
    (figures,) = json.loads(file.read_text())["rows"]
    assert (figures["model"], figures["batch_size"], figures["error"]) == ("mlp", 512, None)


def test_a_model_that_fails_says_why_in_its_row() -> None:
    failed = measure(Row("bert", "cpu", "eager", "nothing", 1, 1024))  # it has 512 positions
    assert failed.error is not None and "512" in failed.error
    assert "failed" not in table([failed], "simple") and failed.error[:20] in table([failed], "simple")


@pytest.mark.parametrize(
    ("found", "is_good", "last"),
    [
        (row(1020), True, "2.00% (llama, nothing), within 2%"),
        (row(1021), False, "2.10% (llama, nothing), exceeds 2%"),
        (row(979), False, "2.10% (llama, nothing), exceeds 2%"),
        (row(1030, target="inductor"), True, "3.00% (llama, nothing), within 3%"),
        (row(1011, device="cuda"), False, "1.10% (llama, nothing), exceeds 1%"),
        (row(error="ValueError: no"), False, "failed: llama, eager, nothing: ValueError: no"),
    ],
)
def test_a_failure_and_a_difference_beyond_the_bound_are_bad(found: Row, is_good: bool, last: str) -> None:
    assert is_within(found) is is_good
    assert worst([found])[-1].endswith(last)


def test_the_worst_of_several_is_named_for_each_target() -> None:
    eager, inductor = worst([row(1001), row(985, plan="half"), row(1002, target="inductor", model="gpt2")])
    assert eager.startswith("eager: ") and "1.50% (llama, half)" in eager
    assert inductor.startswith("inductor: ") and "0.20% (gpt2, nothing)" in inductor


def test_the_spread_of_the_differences_is_told_and_how_many_were_underestimated() -> None:
    eager, inductor = spread([row(1001), row(985), row(1002), row(error="no"), row(998, target="inductor")])
    assert eager == "eager: min / median / max -1.50% / +0.10% / +0.20%; 1 of 3 below the measured peak"
    assert inductor == "inductor: min / median / max -0.20% / -0.20% / -0.20%; 1 of 1 below the measured peak"
    assert spread([row(error="no")]) == []


def test_no_measurement_is_started_when_the_time_is_over(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--models", "mlp", "--targets", "eager", "--minutes", "0"]) == 0
    assert "the time is over: accuracy goes on with mlp, eager, nothing (3 left)" in capsys.readouterr().err


def test_a_line_of_the_table_has_a_cell_for_each_plan() -> None:
    *_, line = table([row(2 * MIB, MIB), row(MIB, MIB, plan="all")], "github").splitlines()
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["llama", "2 x 64", "eager", "2.0 / 1.0 (+100.00%)", "1.0 / 1.0 (+0.00%)"]


def test_cells_of_a_gpu_also_compare_the_reserved_memory() -> None:
    measured = row(MIB, MIB, device="cuda", predicted_reserved_bytes=3 * MIB, reserved_bytes=2 * MIB)
    assert table([measured], "simple").endswith("1.0 / 1.0 (+0.00%), with overhead / reserved 3.0 / 2.0")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--models llama,lama", "--models must be some of llama,qwen3"),
        ("--targets jit", "--targets must be some of eager,inductor, got 'jit'"),
        ("--plans=", "--plans must be some of nothing,half,all, got ''"),
        ("--device tpu", "--device"),
        ("--batch-size 0", "--batch-size must be at least 1, got 0"),
        ("--seq-len -3", "--seq-len must be at least 1, got -3"),
        ("--seq-len long", "--seq-len"),
        ("--minutes nan", "--minutes must be at least 0, got nan"),
        ("--json /nowhere/at/all.json", "there is no folder /nowhere/at"),
        ("--speed", "unrecognized arguments: --speed"),
        pytest.param("--device cuda", "needs a GPU that PyTorch can use", marks=without_gpu),
    ],
)
def test_bad_input_is_refused_with_code_2_before_anything_is_measured(
    arguments: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(main, arguments.split(), capsys, complaint)


def test_sizes_that_are_asked_for_replace_the_models_own_where_there_are_any() -> None:
    asked = asked_for(parse(["--models", "llama,vit", "--batch-size", "3", "--seq-len", "32"]))
    assert {(one.model, one.batch_size, one.length) for one in asked} == {("llama", 3, 32), ("vit", 3, None)}
    assert len(asked) == 2 * 2 * 3


@pytest.mark.parametrize(
    ("name", "parameters"), [("llama-350m-60g", 368e6), ("vit-b-60g", 86.6e6), ("llama-1b-lora", 1345e6)]
)
def test_models_for_a_gpu_have_the_shape_of_the_presets(name: str, parameters: float) -> None:
    with torch.device("meta"):
        model = CASES["cuda"][name].make()
    assert 0.9 < sum(parameter.numel() for parameter in model.parameters()) / parameters < 1.1


def test_the_help_teaches_with_examples() -> None:
    done = ran("accuracy", "--help")
    assert done.returncode == 0
    assert "examples:" in done.stdout and "exit codes:" in done.stdout and "whisper" in done.stdout
