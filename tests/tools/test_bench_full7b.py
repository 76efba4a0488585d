"""`tools/bench.py full7b`: a budget is met or not as its rows say, and the velora row fails where it does not hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from velora_fx.devices import FIXED_BYTES
from velora_fx.peaks import CONTEXT

GIB = 2**30
VELORA, TINY = "velora-factored-compiled", ["full7b", "--device", "cpu", "--models", "llama-tiny"]


@pytest.fixture
def here(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are measured in this process, which has imported everything, and without the check of the operators."""
    monkeypatch.setattr(tools.bench, "complaints_of", lambda args: [])
    monkeypatch.setattr(tools.bench, "measure_full_apart", tools.bench_full7b_train.measure_full)


def full_row(tools: Any, name: str = VELORA, **fields: Any) -> Any:
    """A row of the tiny model without figures."""
    way = tools.bench_full7b.FULL_WAYS[name]
    return replace(tools.bench_full7b.FullRow("llama-tiny", name, way, "cpu", 1, 32, 0.0015, 6), **fields)


def measured_row(tools: Any, **fields: Any) -> Any:
    """A velora row with good figures, but for the given ones."""
    figures = {
        "outcome": "fits", "step": tools.bench_timing.timing_of([1.0] * 3), "peak_bytes": 1000,
        "predicted_bytes": 1000, "first_loss": 3.0, "last_loss": 2.0,
    }  # fmt: skip
    return full_row(tools, **{**figures, **fields})


def rows_in(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows for machines by name."""
    rows = [json.loads(line) for line in (folder / "full7b.jsonl").read_text().splitlines()]
    return {row["name"]: row for row in rows}


def test_velora_meets_a_budget_that_adamw_does_not(
    tools: Any, here: None, monkeypatch: Any, tmp_path: Path, capsys: Any
) -> None:
    """Eagerly: compiled it takes a minute."""
    ways = tools.bench_full7b.FULL_WAYS
    monkeypatch.setattr(tools.bench_full7b, "FULL_WAYS", {**ways, VELORA: replace(ways[VELORA], compiled=False)})
    asked = ["--rows", f"{VELORA},adamw", "--steps", "8", "--results", str(tmp_path)]
    assert tools.bench.main([*TINY, *asked]) == 0
    velora, adamw = (rows_in(tmp_path)[name] for name in (VELORA, "adamw"))
    assert (velora["outcome"], adamw["outcome"]) == ("fits", "over the budget")
    assert velora["peak_bytes"] <= velora["budget_gb"] * GIB < adamw["peak_bytes"]
    assert velora["predicted_bytes"] == pytest.approx(velora["peak_bytes"], rel=0.02)
    assert velora["last_loss"] < velora["first_loss"] and adamw["predicted_bytes"] is None
    assert velora["step"]["repeats"] == 5 and velora["header"]["torch"] and velora["tokens_per_second"] > 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("command")
    assert [line.split("|")[3].strip() for line in lines[-2:]] == [VELORA, "adamw"]


def test_steps_in_backward_are_those_of_one_optimizer_in_less_memory(tools: Any) -> None:
    rows = [
        tools.bench_full7b_train.measure_full(full_row(tools, name))
        for name in ("adamw", "adamw-in-backward-checkpointing", "sgd-in-backward-checkpointing")
    ]
    assert [row.error for row in rows] == [None] * 3
    adamw, in_backward, sgd = rows
    assert in_backward.last_loss == pytest.approx(adamw.last_loss, rel=1e-4)
    assert sgd.peak_bytes < in_backward.peak_bytes < adamw.peak_bytes


def test_a_budget_that_no_plan_meets_fails(
    tools: Any, here: None, monkeypatch: Any, tmp_path: Path, capsys: Any
) -> None:
    ways = tools.bench_full7b.FULL_WAYS
    monkeypatch.setattr(tools.bench_full7b, "FULL_WAYS", {VELORA: replace(ways[VELORA], compiled=False)})
    asked = ["--rows", VELORA, "--budget-gb", "0.0001", "--steps", "6", "--results", str(tmp_path)]
    assert tools.bench.main([*TINY, *asked]) == 1
    assert rows_in(tmp_path)[VELORA]["error"].startswith("BudgetError: no plan fits")
    assert "BudgetError: no plan fits" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "code"), [(VELORA, 1), ("adamw", 0)])
def test_running_out_of_memory_is_a_failure_of_velora_alone(
    tools: Any, here: None, name: str, code: int, monkeypatch: Any, tmp_path: Path, capsys: Any
) -> None:
    def run_out(row: Any) -> Any:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except torch.OutOfMemoryError as error:
            raise RuntimeError("the compiler's") from error

    monkeypatch.setattr(tools.bench_full7b_train, "make_full_model", run_out)
    assert tools.bench.main([*TINY, "--rows", name, "--results", str(tmp_path)]) == code
    assert rows_in(tmp_path)[name]["outcome"] == "out of memory: making the model"
    assert "| out of memory: making the model" in capsys.readouterr().out.splitlines()[-1]


def test_a_rival_that_breaks_is_a_failure(tools: Any, here: None, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(tools.bench_full7b_train, "make_full_model", lambda row: 1 / 0)
    assert tools.bench.main([*TINY, "--rows", "adamw", "--results", str(tmp_path)]) == 1
    assert rows_in(tmp_path)["adamw"]["error"].startswith("ZeroDivisionError")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({}, ""),
        ({"peak_bytes": 1049}, ""),
        ({"peak_bytes": 1051}, "the measured peak is +5.1% off the predicted one, allowed 5%"),
        ({"peak_bytes": 949}, "the measured peak is -5.1% off the predicted one, allowed 5%"),
        ({"outcome": "over the budget"}, "over the budget"),
        ({"last_loss": 3.0}, "the loss did not fall: 3.0000 at first, 3.0000 at last"),
        ({"last_loss": float("nan")}, "the loss did not fall: 3.0000 at first, nan at last"),
    ],
    ids=str,
)
def test_velora_has_to_hold_what_it_claims(
    tools: Any, here: None, fields: dict[str, Any], complaint: str, monkeypatch: Any, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(tools.bench_full7b_train, "_train", lambda row: measured_row(tools, **fields))
    code = tools.bench.main([*TINY, "--rows", VELORA, "--results", str(tmp_path)])
    assert code == (1 if complaint else 0)
    assert (rows_in(tmp_path)[VELORA]["error"] or "") == complaint
    printed = capsys.readouterr()
    assert complaint in printed.err and ("failed" in printed.out.splitlines()[-1]) is bool(complaint)


def test_on_a_gpu_the_allocator_ends_where_budget_and_context_do(tools: Any, monkeypatch: Any) -> None:
    shares: list[float] = []
    cuda = SimpleNamespace(
        current_device=lambda: 0,
        get_device_properties=lambda device: SimpleNamespace(total_memory=80 * GIB),
        set_per_process_memory_fraction=shares.append,
    )
    monkeypatch.setattr(tools.bench_full7b_train.torch, "cuda", cuda)
    for budget_gb in (24, 100, 0.1):
        tools.bench_full7b_train.limit_memory(budget_gb)
    assert shares == [pytest.approx((24 - FIXED_BYTES[CONTEXT] / GIB) / 80), 1.0, 0.0]


def test_a_model_for_a_gpu_is_made_in_bfloat16(tools: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(tools.bench_full7b.FullRow, "dtype", torch.bfloat16)
    model = tools.bench_full7b_train.make_full_model(full_row(tools))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32 and not model.config.use_cache and model.training


def test_texts_are_real_and_within_the_vocabulary(tools: Any) -> None:
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=32000))
    texts = tools.bench_full7b_train.real_texts(full_row(tools), model)
    assert len(texts) == 6 and all(text.shape == (1, 32) for text in texts)
    assert any(word in bytes(torch.cat(texts).flatten().tolist()) for word in (b"self", b"def ", b"    "))
    model.config.vocab_size = 100
    assert max(int(text.max()) for text in tools.bench_full7b_train.real_texts(full_row(tools), model)) < 100


def test_a_wrong_fold_is_complained_about(tools: Any, monkeypatch: Any) -> None:
    numerics = tools.bench_numerics
    assert numerics.fold_complaints("cpu") == []
    monkeypatch.setattr(numerics, "fold", lambda weights, carriers, vs, keep: carriers[0].zero_())
    assert len(numerics.fold_complaints("cpu")) == 4


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--steps", "5"], "--steps must be at least 6, got 5"),
        (["--budget-gb", "0"], "--budget-gb must be a positive number of GiB, got 0"),
        (["--budget-gb", "nan"], "--budget-gb must be a positive number of GiB, got nan"),
        (["--device", "cpu", "--models", "llama-7b"], "--models must be some of llama-cpu,llama-tiny, got 'llama-7b'"),
        (["--rows", "eager"], "--rows must be some of velora-factored-compiled,adamw,"),
        (["--quick"], "unrecognized arguments: --quick"),
        (["--sub-token-size", "8"], "unrecognized arguments: --sub-token-size 8"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_with_code_2(tools: Any, arguments: list[str], complaint: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as left:
        tools.bench.main(["full7b", *arguments])
    assert left.value.code == 2
    assert complaint in capsys.readouterr().err


def test_the_default_is_all_rows_of_the_first_model(tools: Any) -> None:
    args = tools.bench.parse(["full7b", "--device", "cpu", "--batch-size", "2", "--budget-gb", "0.3"])
    rows = tools.bench_full7b.full_rows(args)
    assert [row.name for row in rows] == list(tools.bench_full7b.FULL_WAYS)
    assert {(row.model, row.batch_size, row.length, row.budget_gb) for row in rows} == {("llama-cpu", 2, 256, 0.3)}


@pytest.mark.slow
def test_the_whole_command_runs_in_processes_of_its_own(tools: Any, tmp_path: Path) -> None:
    """Minutes: a compiled step of the tiny model misses its prediction by 12 KB, which is too much of its budget."""
    assert tools.bench.main(["full7b", "--device", "cpu", "--results", str(tmp_path)]) == 0
    outcomes = {name: row["outcome"] for name, row in rows_in(tmp_path).items()}
    assert outcomes.pop(VELORA) == outcomes.pop("sgd-in-backward-checkpointing") == "fits"
    assert len(outcomes) == 3 and set(outcomes.values()) == {"over the budget"}
