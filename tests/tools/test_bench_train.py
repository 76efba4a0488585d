"""Training rows of tools/bench: their figures are true, and rows that fail say why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tools.accuracy.models import batch_of
from tools.bench import train
from tools.bench.figures import gradient_errors
from tools.bench.models import compressible, make_model, nearest_divisor, sub_token_sizes
from tools.bench.plan_files import read_plan
from tools.bench.prepare import prepare_row
from tools.bench.timing import timing_of
from tools.bench.train import TrainRow, Way, measure, require_right
from tools.bench.ways import STEP_WAYS, train_table
from velora_fx.analyse import differences_of


def train_row(name: str, way: Way, **fields: Any) -> TrainRow:
    """A row without figures."""
    return replace(TrainRow("llama-tiny", name, way, "cpu", 2, 32, 32, 2), **fields)


def test_an_untouched_row_has_exact_gradients_and_the_predicted_peak() -> None:
    row = measure(train_row("eager", Way()))
    assert row.error is None
    assert (row.tokens, row.num_compressed, row.compressed_error, row.exact_error) == (64, 0, None, 0.0)
    assert row.predicted_bytes == pytest.approx(row.peak_bytes, rel=0.01)
    assert 0 < row.saved_bytes < row.peak_bytes


@pytest.mark.slow
def test_checkpointing_keeps_less_and_is_exact() -> None:
    eager = measure(train_row("eager", Way(is_planned=False)))
    row = measure(train_row("checkpointing", Way(checkpointed=True, is_planned=False)))
    assert row.error is None and row.exact_error <= 1e-5
    assert row.saved_bytes < eager.saved_bytes and row.predicted_bytes is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compile", "compile+checkpointing"])
def test_compiled_rows_are_exact(name: str) -> None:
    row = measure(train_row(name, STEP_WAYS[name]))
    assert row.error is None and row.exact_error <= 1e-5 and row.saved_bytes > 0


def test_peft_velora_approximates_the_gradients_of_a_alone() -> None:
    pytest.importorskip("peft.tuners.lora.velora")
    row = measure(train_row("peft-velora", Way(adapter="peft-velora", is_planned=False)))
    assert row.error is None and row.num_compressed == 14
    assert row.exact_error <= 1e-5 and row.compressed_error is not None and 0.3 < row.compressed_error < 3


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["", "lora"])
def test_velora_rows_compress_and_tell_their_error(adapter: str) -> None:
    row = measure(train_row("velora-eager-all", Way(adapter=adapter, compresses="all")))
    assert row.error is None and row.num_compressed > 0
    assert row.exact_error <= 1e-5 and row.compressed_error is not None and 0.3 < row.compressed_error < 3
    assert row.predicted_bytes == pytest.approx(row.peak_bytes, rel=0.02)


@pytest.mark.parametrize(
    ("dtype", "factor", "compressed"),
    [
        (torch.float32, 1.01, set()),
        (torch.bfloat16, 1.4, set()),
        (torch.bfloat16, 1.4, {"weight"}),
        (torch.float32, float("nan"), set()),
    ],
)
def test_wrong_exact_gradients_are_not_let_pass(dtype: torch.dtype, factor: float, compressed: set[str]) -> None:
    model = nn.Linear(2, 2)
    model.weight.grad, model.bias.grad = torch.ones(2, 2), torch.ones(2)
    right = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    require_right(*gradient_errors(model, right, compressed), dtype)
    model.bias.grad *= factor
    with pytest.raises(RuntimeError, match="exact gradients are off by"):
        require_right(*gradient_errors(model, right, compressed), dtype)


def test_compressed_gradients_that_are_no_numbers_are_not_let_pass() -> None:
    model = nn.Linear(2, 2, bias=False)
    model.weight.grad = torch.full((2, 2), float("nan"))
    with pytest.raises(RuntimeError, match="compressed gradients are not finite"):
        require_right(*gradient_errors(model, {"weight": torch.ones(2, 2)}, {"weight"}), torch.float32)


def test_a_row_that_fails_says_why_in_the_table() -> None:
    row = measure(train_row("eager", Way(), model="no-such-model"))
    assert row.error == "KeyError: 'no-such-model'"
    assert "KeyError: 'no-such-model'" in train_table([row], "compile")


def test_speed_and_its_bound_are_told_as_ratios_to_the_compiled_row_of_the_same_model() -> None:
    rows = [
        train_row(name, STEP_WAYS[name], tokens=64, step=timing_of([seconds] * 3), exact_error=2e-7, **figures)
        for name, seconds, figures in (
            ("compile", 0.2, {"planning_seconds": 0.5, "has_plan_file": True}),
            ("velora-compiled-all", 0.1, {"num_compressed": 14, "num_linears": 15, "products_seconds": 0.04}),
            ("velora-eager-all", 0.4, {"products_seconds": 0.04}),
        )
    ]
    dense, ours, eager = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in train_table(rows, "compile").splitlines()[2:]
    )
    assert ours[2:7] == ["velora-compiled-all", "100.0 ±0.0", "640", "2.000", "1.250"]
    assert ours[10] == "14 of 15" and ours[-2] == "2.0e-07"
    assert dense[5:7] == ["1.000", "-"] and eager[5:7] == ["0.500", "-"]
    assert dense[-1] == "0.5 (file) + 0.0 + 0.0"


@pytest.mark.slow
def test_a_plan_made_ahead_is_taken_by_both_of_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    velora, untouched = (
        train_row(name, Way(compresses=what), batch_size=4, length=64, sub_token_size=16)
        for name, what in (("velora-eager-all", "all"), ("eager", ""))
    )
    assert velora.plan_name == untouched.plan_name != replace(velora, way=Way(compresses="v+down")).plan_name
    made = measure(velora, tmp_path)
    assert prepare_row(velora, tmp_path).error is None
    monkeypatch.setattr(train, "plan_for", None)
    row = measure(velora, tmp_path)
    assert (made.has_plan_file, row.has_plan_file, row.error) == (False, True, None)
    assert row.predicted_bytes == made.predicted_bytes and row.num_compressed == made.num_compressed > 0
    dense = measure(untouched, tmp_path)
    assert (dense.error, dense.has_plan_file, dense.num_compressed) == (None, True, 0)
    assert dense.predicted_bytes == pytest.approx(dense.peak_bytes, rel=0.01)
    assert 0 < row.planning_seconds + row.compiling_seconds + row.steps_seconds < row.seconds
    assert row.products_seconds is not None and row.products_seconds > 0


@pytest.mark.parametrize("adapter", ["", pytest.param("lora", marks=pytest.mark.slow)])
def test_plans_are_made_for_a_gpu_that_is_not_there(adapter: str, tmp_path: Path) -> None:
    row = train_row("velora-eager", Way(adapter=adapter, compresses="all"), device="cuda")
    assert prepare_row(row, tmp_path).error is None
    plan = read_plan(tmp_path, row.plan_name)
    model = make_model(row.model, adapter, "cpu", row.dtype, row.sub_token_size)
    batch = batch_of(model, row.batch_size, row.length)
    assert plan is not None and plan.device == "cuda" and differences_of(plan, model, (), batch) == []


@pytest.mark.parametrize(("width", "size"), [(5461, 43), (2736, 36), (2048, 32), (11008, 32), (768, 32), (17, 17)])
def test_sub_tokens_are_the_nearest_divisor(width: int, size: int) -> None:
    assert nearest_divisor(width, 32) == size


def test_inputs_narrower_than_a_sub_token_are_offered_no_size() -> None:
    model = nn.Sequential(nn.Linear(768, 16), nn.Linear(16, 5461), nn.Linear(5461, 4))
    assert sub_token_sizes(model, 32) == (32, 43)


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
def test_the_papers_choice_is_values_and_the_second_linear_of_mlps(name: str, expected: bool) -> None:
    is_compressible = compressible("v+down")
    assert is_compressible is not None and is_compressible(nn.Linear(1, 1), name) is expected
