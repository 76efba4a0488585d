"""Training rows of tools/bench.py: their figures are true, and rows that fail say why."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn


def train_row(tools: Any, name: str, way: Any, **fields: Any) -> Any:
    """A row without figures."""
    return replace(tools.bench_train.TrainRow("llama-tiny", name, way, "cpu", 2, 32, 32, 2), **fields)


def test_an_untouched_row_has_exact_gradients_and_the_predicted_peak(tools: Any) -> None:
    row = tools.bench_train.measure(train_row(tools, "eager", tools.bench_train.Way()))
    assert row.error is None
    assert (row.tokens, row.num_compressed, row.compressed_error, row.exact_error) == (64, 0, None, 0.0)
    assert row.predicted_bytes == pytest.approx(row.peak_bytes, rel=0.01)
    assert 0 < row.saved_bytes < row.peak_bytes


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1.01), (torch.bfloat16, 1.4)])
@pytest.mark.parametrize("compresses", ["", "all"])
def test_a_row_whose_exact_gradients_are_wrong_is_not_timed(
    tools: Any, dtype: torch.dtype, factor: float, compresses: str, monkeypatch: Any
) -> None:
    train, right = tools.bench_train, tools.bench_train.untouched_gradients
    monkeypatch.setattr(train.TrainRow, "dtype", dtype)
    monkeypatch.setattr(train, "prepare", lambda *args: None)
    monkeypatch.setattr(train, "compressed_weights", lambda *args: {"lm_head.weight"} if compresses else set())
    monkeypatch.setattr(train, "untouched_gradients", right)
    row = train_row(tools, "eager", train.Way(compresses=compresses))
    assert train.measure(row).error is None

    def wrong(row: Any) -> dict[str, torch.Tensor]:
        return {name: grad * factor if "norm" in name else grad for name, grad in right(row).items()}

    monkeypatch.setattr(train, "untouched_gradients", wrong)
    found = train.measure(row)
    assert found.step is None and found.error.startswith("RuntimeError: exact gradients are off by ")


@pytest.mark.parametrize("compressed", [set(), {"weight"}], ids=["exact", "compressed"])
def test_gradients_that_are_no_numbers_are_wrong(tools: Any, compressed: set[str]) -> None:
    model, right = nn.Linear(2, 2), {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    model.weight.grad, model.bias.grad = torch.full((2, 2), float("nan")), torch.ones(2)
    errors = tools.bench_figures.gradient_errors(model, right, compressed)
    with pytest.raises(RuntimeError, match="gradients"):
        tools.bench_train.require_right(*errors, torch.float32)


def test_checkpointing_keeps_less_and_is_exact(tools: Any) -> None:
    way = tools.bench_train.Way
    eager = tools.bench_train.measure(train_row(tools, "eager", way(is_planned=False)))
    row = tools.bench_train.measure(train_row(tools, "checkpointing", way(checkpointed=True, is_planned=False)))
    assert row.error is None and row.exact_error <= 1e-5
    assert row.saved_bytes < eager.saved_bytes and row.predicted_bytes is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compile", "compile+checkpointing"])
def test_compiled_rows_are_exact(tools: Any, name: str) -> None:
    row = tools.bench_train.measure(train_row(tools, name, tools.bench.STEP_WAYS[name]))
    assert row.error is None and row.exact_error <= 1e-5 and row.saved_bytes > 0


def test_peft_velora_approximates_the_gradients_of_a_alone(tools: Any) -> None:
    pytest.importorskip("peft.tuners.lora.velora")
    way = tools.bench_train.Way(adapter="peft-velora", is_planned=False)
    row = tools.bench_train.measure(train_row(tools, "peft-velora", way))
    assert row.error is None and row.num_compressed == 14
    assert row.exact_error <= 1e-5 and 0.3 < row.compressed_error < 3


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["", "lora"])
def test_velora_rows_compress_and_tell_their_error(tools: Any, adapter: str) -> None:
    way = tools.bench_train.Way(adapter=adapter, compresses="all")
    row = tools.bench_train.measure(train_row(tools, "velora-eager-all", way))
    assert row.error is None and row.num_compressed > 0
    assert row.exact_error <= 1e-5 and 0.3 < row.compressed_error < 3
    assert row.predicted_bytes == pytest.approx(row.peak_bytes, rel=0.02)


def test_a_row_that_fails_says_why_in_the_table(tools: Any) -> None:
    row = tools.bench_train.measure(train_row(tools, "eager", tools.bench_train.Way(), model="no-such-model"))
    assert row.error == "KeyError: 'no-such-model'"
    assert "KeyError: 'no-such-model'" in tools.bench.train_table([row], "compile")


def test_a_velora_row_that_compresses_nothing_has_no_figures(tools: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(tools.bench_train, "prepare", lambda *args: None)
    row = tools.bench_train.measure(train_row(tools, "velora-eager-all", tools.bench_train.Way(compresses="all")))
    assert row.error == "RuntimeError: nothing was compressed"


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
        train_row(tools, name, way, tokens=64, step=timing([seconds] * 3), exact_error=2e-7)
        for name, seconds in {"compile": 0.2, "velora-compiled-all": 0.1}.items()
    ]
    *_, last = tools.bench.train_table(rows, "compile").splitlines()
    cells = [cell.strip() for cell in last.strip("|").split("|")]
    assert cells[2:6] == ["velora-compiled-all", "100.0 ±0.0", "640", "2.000"]
    assert cells[-1] == "2.0e-07"


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
