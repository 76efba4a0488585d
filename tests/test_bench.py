"""tools/bench.py: what it measures is true, wrong operators are never timed, and failures are told in their rows."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from velora_fx import ops

TOOLS = Path(__file__).resolve().parents[1] / "tools"
MODULES = ("bench", "bench_models", "bench_numerics", "bench_ops", "bench_results", "bench_timing", "bench_train")
SMALL: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def tools() -> Any:
    """The tool's modules by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})


@pytest.fixture
def small_model(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in place of llama-cpu that takes no time."""
    monkeypatch.setitem(tools.bench_models.MODELS, "llama-cpu", ("LlamaForCausalLM", SMALL))


@pytest.fixture
def small_cases(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators of one small size."""
    case = tools.bench_ops.OpCase(64, 64, 32, "float32", 16)
    monkeypatch.setattr(tools.bench, "op_cases", lambda device, quick: [case])
    monkeypatch.setattr(tools.bench, "copy_bandwidth", lambda device, repeats: 1e10)
    monkeypatch.setattr(tools.bench_timing, "CPU_ROTATED_BYTES", 2**16)


def train_row(tools: Any, name: str, way: Any, **fields: Any) -> Any:
    """A row without figures."""
    return replace(tools.bench_train.TrainRow("llama-cpu", name, way, "cpu", 2, 32, 32, 2), **fields)


def rows_in(file: Path) -> list[dict[str, Any]]:
    """The rows of a file for machines."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_operators_are_checked_timed_and_written(tools: Any, small_cases: None, tmp_path: Path, capsys: Any) -> None:
    assert tools.bench.main(["ops", "--device", "cpu", "--repeats", "3", "--results", str(tmp_path)]) == 0
    rows = rows_in(tmp_path / "ops.jsonl")
    assert [row["operator"] for row in rows] == ["compress", "expand", "dW"]
    assert all(row["header"]["torch"] and row["error"] is None and row["ours"]["repeats"] == 3 for row in rows)
    assert rows[0]["bytes"] == 4 * 64 * (64 + 4)
    bound = max(rows[2]["dense"]["median_seconds"] / 16, 4 * 64 * (32 + 4) / 1e10) + 4 * 32 * 64 / 1e10
    assert rows[2]["bound_seconds"] == pytest.approx(bound)
    assert rows[2]["over_bound"] == pytest.approx(rows[2]["ours"]["median_seconds"] / bound)
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


def test_a_right_training_step_has_no_complaints(tools: Any) -> None:
    assert tools.bench_numerics.training_complaints("cpu", torch.float32) == []


def test_a_wrong_training_step_is_never_timed(tools: Any, monkeypatch: Any, tmp_path: Path, capsys: Any) -> None:
    right = ops.compress_blocks  # what compress runs on CPU
    monkeypatch.setattr(ops, "compress_blocks", lambda *taken: right(*taken) * 1.1)
    assert tools.bench.main(["step", "--device", "cpu", "--results", str(tmp_path)]) == 1
    assert "compressed gradient of model.layers.0" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_untouched_row_has_exact_gradients_and_the_predicted_peak(tools: Any, small_model: None) -> None:
    row = tools.bench_train.measure(train_row(tools, "eager", tools.bench_train.Way()))
    assert row.error is None and row.is_ok
    assert (row.tokens, row.num_compressed, row.compressed_error, row.exact_error) == (64, 0, None, 0.0)
    assert row.predicted_bytes == pytest.approx(row.peak_bytes, rel=0.01)
    assert 0 < row.saved_bytes < row.peak_bytes


def test_checkpointing_keeps_less_and_is_exact(tools: Any, small_model: None) -> None:
    way = tools.bench_train.Way
    eager = tools.bench_train.measure(train_row(tools, "eager", way(is_planned=False)))
    row = tools.bench_train.measure(train_row(tools, "checkpointing", way(checkpointed=True, is_planned=False)))
    assert row.error is None and row.exact_error <= 1e-5
    assert row.saved_bytes < eager.saved_bytes and row.predicted_bytes is None


def test_peft_velora_approximates_the_gradients_of_a_alone(tools: Any, small_model: None) -> None:
    pytest.importorskip("peft.tuners.lora.velora")
    way = tools.bench_train.Way(adapter="peft-velora", is_planned=False)
    row = tools.bench_train.measure(train_row(tools, "peft-velora", way))
    assert row.error is None and row.num_compressed == 14
    assert row.exact_error <= 1e-5 and 0.3 < row.compressed_error < 3


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["", "lora"])
def test_velora_rows_compress_and_tell_their_error(tools: Any, small_model: None, adapter: str) -> None:
    way = tools.bench_train.Way(adapter=adapter, compresses="all")
    row = tools.bench_train.measure(train_row(tools, "velora-eager-all", way))
    assert row.error is None and row.num_compressed > 0
    assert row.exact_error <= 1e-5 and 0.3 < row.compressed_error < 3
    assert row.predicted_bytes == pytest.approx(row.peak_bytes, rel=0.02)


def test_a_row_that_fails_says_why_in_the_table(tools: Any) -> None:
    row = tools.bench_train.measure(train_row(tools, "eager", tools.bench_train.Way(), model="no-such-model"))
    assert row.error == "KeyError: 'no-such-model'" and not row.is_ok
    assert "KeyError: 'no-such-model'" in tools.bench.train_table([row], "compile")


def test_a_failed_row_makes_the_exit_code_1_and_is_written(tools: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(tools.bench, "complaints_of", lambda args: [])
    monkeypatch.setattr(tools.bench, "measure_apart", lambda row: replace(row, error="OutOfMemoryError: all of it"))
    assert tools.bench.main(["step", "--device", "cpu", "--rows", "eager,compile", "--results", str(tmp_path)]) == 1
    rows = rows_in(tmp_path / "step.jsonl")
    assert [(row["name"], row["error"]) for row in rows] == [
        ("eager", "OutOfMemoryError: all of it"),
        ("compile", "OutOfMemoryError: all of it"),
    ]


class Deadly:
    """Ends the process in which it arrives."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (1,)


def test_a_process_that_dies_takes_only_its_own_row_with_it(tools: Any) -> None:
    row = train_row(tools, "eager", tools.bench_train.Way(), model=Deadly())
    assert tools.bench_train.measure_apart(row).error == "its process died"


def test_speed_is_told_as_a_ratio_to_the_compiled_row_of_the_same_model(tools: Any) -> None:
    way, timing = tools.bench_train.Way(), tools.bench_timing.timing_of
    rows = [
        train_row(tools, name, way, tokens=64, step=timing([seconds] * 3))
        for name, seconds in {"compile": 0.2, "velora-compiled-all": 0.1}.items()
    ]
    *_, last = tools.bench.train_table(rows, "compile").splitlines()
    cells = [cell.strip() for cell in last.strip("|").split("|")]
    assert cells[2:6] == ["velora-compiled-all", "100.0 ±0.0", "640", "2.000"]


def test_timings_are_medians_with_the_distance_between_the_quartiles(tools: Any) -> None:
    timing = tools.bench_timing.timing_of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (timing.median_seconds, timing.min_seconds, timing.spread_seconds, timing.repeats) == (3.0, 1.0, 2.0, 5)


def test_inputs_are_taken_in_turn(tools: Any) -> None:
    taken: list[int] = []
    calls = [lambda number=number: taken.append(number) for number in range(3)]
    tools.bench_timing.timed(calls, "cpu", repeats=4, warm_up=2)
    assert taken == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(("width", "size"), [(5461, 43), (2736, 36), (2048, 32), (11008, 32), (768, 32), (17, 17)])
def test_sub_tokens_are_the_nearest_divisor(tools: Any, width: int, size: int) -> None:
    assert tools.bench_models.nearest_divisor(width, 32) == size


def test_inputs_narrower_than_a_sub_token_are_offered_no_size(tools: Any) -> None:
    model = nn.Sequential(nn.Linear(768, 16), nn.Linear(16, 5461), nn.Linear(5461, 4))
    assert tools.bench_models.sub_token_sizes(model, 32) == (32, 43)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.self_attn.v_proj", True),
        ("model.layers.0.mlp.down_proj", True),
        ("model.layers.0.self_attn.q_proj", False),
        ("vit.layers.0.mlp.fc2", True),
        ("vit.encoder.layer.0.attention.attention.value", True),
        ("vit.encoder.layer.0.output.dense", True),
        ("vit.encoder.layer.0.attention.output.dense", False),
    ],
)
def test_the_papers_choice_is_values_and_the_second_linear_of_mlps(tools: Any, name: str, expected: bool) -> None:
    assert tools.bench_models.compressible("v+down")(nn.Linear(1, 1), name) is expected


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "ops|step|lora"),
        (["speed"], "invalid choice"),
        (["ops", "--rows", "dX"], "--rows must be some of compress,expand,dW, got 'dX'"),
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


def test_lora_without_peft_says_what_to_install(tools: Any, monkeypatch: Any, capsys: Any) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    with pytest.raises(SystemExit) as left:
        tools.bench.main(["lora"])
    assert left.value.code == 2
    assert "pip install" in capsys.readouterr().err


def test_the_help_teaches_with_examples() -> None:
    command = [sys.executable, str(TOOLS / "bench.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "examples:" in done.stdout and "exit codes:" in done.stdout and "velora-compiled-all" in done.stdout


def test_a_velora_row_that_compresses_nothing_has_no_figures(tools: Any, small_model: None, monkeypatch: Any) -> None:
    monkeypatch.setattr(tools.bench_train, "prepare", lambda *args: None)
    row = tools.bench_train.measure(train_row(tools, "velora-eager-all", tools.bench_train.Way(compresses="all")))
    assert row.error == "RuntimeError: nothing was compressed" and not row.is_ok


def test_results_of_operators_are_kept_until_they_fill_the_cache(tools: Any, monkeypatch: Any) -> None:
    """Freed at once, their memory would be written again while it is cached."""
    monkeypatch.setattr(tools.bench_timing, "CPU_ROTATED_BYTES", 2**12)
    row = tools.bench_ops.OpRow("expand", "cpu", tools.bench_ops.OpCase(8, 8, 8, "float32", 4), 1e10, 12)
    places: list[int] = []

    def contender(x: torch.Tensor) -> torch.Tensor:
        result = x.new_empty(256)
        places.append(result.data_ptr())
        return result

    tools.bench_ops._time(row, [contender], [(torch.ones(1),)])
    assert all(len(set(places[start : start + 4])) == 4 for start in range(1, len(places) - 4))
