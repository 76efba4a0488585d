"""tools/quality: what it trains, how its rows go on, what its tables and prices say."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tools.quality.data as data
import tools.quality.main as command
from tests.tools.commands import ROOT, assert_refused, ran
from tools.quality.data import Tokens, batch_at, load_tokens
from tools.quality.fit import fit, fit_text, shares_line
from tools.quality.main import main
from tools.quality.models import batch_of, compress, make_model
from tools.quality.moments import BETAS, WEIGHT_DECAY, FoldedAdamW
from tools.quality.publish import PAGE, PRICE, with_tables
from tools.quality.rows import Row, read_rows
from tools.quality.table import results, tables
from tools.quality.train import run, share_of_rate
from tools.quality.ways import SIZES, TASKS, WAYS, Way
from velora_fx.choose.price import SHARES
from velora_fx.ops import sign_projection
from velora_fx.ops.velora import compress as compress_sub_tokens

TINY = TASKS["pretrain-tiny"]
WORDS = TINY.shape.words


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of texts that stand for what is installed, and the cache beside it."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(120):
        names = " ".join(f"name_{number}_{n} = {n * number}" for n in range(40))
        (folder / f"{number}.py").write_text(f"def function_{number}(x):\n    return {names}\n")
    monkeypatch.setattr(data, "_paths", lambda endings: sorted(folder.iterdir()))
    return tmp_path


def arguments_for(folder: Path, ways: str, *more: str) -> list[str]:
    places = ["--results", str(folder / "rows"), "--cache", str(folder / "cache")]
    return ["--tasks", "pretrain-tiny", "--ways", ways, *places, *more]


def row_of(name: str, seed: int = 0, rate: float = 1e-2, loss: float | None = None, **other: Any) -> Row:
    way = WAYS[name] if name in WAYS else Way()
    row = Row("pretrain-tiny", TINY, name, way, "cpu", "text", seed, rate, TINY.steps, loss=loss, step_seconds=1.0)
    return replace(row, **other)


def tokens_of_chance() -> Tokens:
    generator = torch.Generator().manual_seed(0)
    train, validation = torch.randint(WORDS, (2, 2000), generator=generator)
    return Tokens(train, validation, "text")


def test_the_help_teaches_with_examples_and_shows_no_path_of_this_machine() -> None:
    done = ran("quality", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "examples:" in done.stdout and "exit codes:" in done.stdout and "mean-8-v+down" in done.stdout
    assert str(ROOT) not in done.stdout and str(Path.home()) not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--tasks chess", "--tasks must be some of pretrain-1m, pretrain-4m,"),
        ("--ways signs", "--ways must be some of dense, signs-8,"),
        ("--rates fast", "--rates must be numbers such as 1e-3,2e-3, got 'fast'"),
        ("--rates 1e-3,-1", "--rates must be positive, got '1e-3,-1'"),
        ("--seeds 0", "--seeds must be at least 1, got 0"),
        ("--steps 3", "--steps must be at least 4, got 3"),
        ("--minutes nan", "--minutes must be at least 0, got nan"),
        ("--json nowhere/figures.json", "--json: there is no folder"),
    ],
)
def test_bad_input_is_refused_with_code_2(arguments: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(main, arguments.split(), capsys, complaint)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_where_it_was(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = arguments_for(texts, "dense,signs-8,mean-8-v+down", "--seeds", "2")
    assert main(arguments) == 0
    file = texts / "rows" / "quality.jsonl"
    whole = read_rows(file)
    assert len(whole) == 6 + 4  # and runs of equal time of all but dense
    lines = file.read_text().splitlines()
    assert main(arguments) == 0
    assert file.read_text().splitlines() == lines
    file.write_text("\n".join(lines[:4]) + "\n")
    assert main([*arguments, "--no-equal-time"]) == 0
    again = {row.key: row.loss for row in read_rows(file)}
    assert again == {row.key: row.loss for row in whole if not row.equal_time}
    printed = capsys.readouterr().out
    assert "pretrain-tiny, cpu, 4 steps of 32 tokens" in printed and "| mean-8-v+down" in printed


def test_no_run_is_started_that_would_not_end_in_time(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments_for(texts, "dense", "--minutes", "0")) == 0
    printed = capsys.readouterr()
    assert "the time is over" in printed.err and "there are no rows yet" in printed.out


def test_a_failed_run_is_told_and_tried_again(
    texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = arguments_for(texts, "dense", "--seeds", "1")
    with monkeypatch.context() as patched:
        patched.setattr(command, "run", lambda row, tokens, cache: replace(row, error="OSError: no room"))
        assert main(arguments) == 1
    assert "OSError: no room" in capsys.readouterr().err
    assert main(arguments) == 0
    assert [row.error for row in read_rows(texts / "rows" / "quality.jsonl")] == [None]


def test_no_text_is_both_trained_and_validated_on(texts: Path) -> None:
    (texts / "texts" / "copy.py").write_text((texts / "texts" / "7.py").read_text())
    parts = data._split("python", megabytes=1)
    assert len(parts["train"]) + len(parts["validation"]) == 120 and parts["validation"]
    assert not set(parts["train"].values()) & set(parts["validation"].values())


def test_another_text_is_another_corpus(texts: Path) -> None:
    first = load_tokens("python", WORDS, 1, texts / "cache")
    assert first.corpus == load_tokens("python", WORDS, 1, texts / "cache").corpus
    assert int(first.train.max()) < WORDS
    (texts / "texts" / "7.py").write_text("x = 7\n")
    assert first.corpus != load_tokens("python", WORDS, 1, texts / "cache").corpus


def test_batches_are_those_of_the_seed() -> None:
    tokens = torch.arange(1000)
    first, again, other = (batch_at(tokens, 3, 16, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first.diff(dim=1), torch.ones(3, 15, dtype=torch.int64))


def test_a_way_that_spares_all_blocks_is_the_dense_one_to_the_bit() -> None:
    dense, spared, signs = (
        run(row_of(name), tokens_of_chance(), Path()) for name in ("dense", "signs-8-spared-ends", "signs-8")
    )
    assert (dense.error, dense.loss) == (None, spared.loss)
    assert signs.loss != dense.loss and (spared.num_compressed, signs.num_compressed) == (0, 12)


def test_factored_gradients_train_as_dense_ones_of_the_same_signs() -> None:
    signs, factored = (run(row_of(name), tokens_of_chance(), Path()) for name in ("signs-8", "signs-8-factored"))
    assert factored.loss == pytest.approx(signs.loss, rel=1e-5)
    assert factored.peak_bytes < signs.peak_bytes


@pytest.mark.parametrize("name", ["mean-8-v+down", "signs-8-v+down", "signs-32-down", "signs-8-attention"])
def test_a_way_compresses_the_linears_that_it_names_and_no_others(name: str) -> None:
    way = WAYS[name]
    ids = torch.randint(WORDS, (TINY.texts, TINY.length), generator=torch.Generator().manual_seed(0))
    dense, ours = (make_model(TINY, way, 0, "cpu", None) for _ in range(2))
    assert compress(ours, TINY, way, batch_of(TINY, ids), seed=0) == TINY.shape.layers * len(way.sizes)
    for model in (dense, ours):
        model(**batch_of(TINY, ids)).loss.backward()
    approximate = set()
    for (parameter, exact), (_, found) in zip(dense.named_parameters(), ours.named_parameters(), strict=True):
        assert exact.grad is not None and found.grad is not None
        if not torch.allclose(exact.grad, found.grad, rtol=1e-4, atol=1e-7):
            approximate.add(parameter)
    assert approximate == {p for p, _ in dense.named_parameters() if set(p.split(".")) & set(way.sizes)}


def test_frozen_linears_stay_and_all_else_is_trained() -> None:
    model = make_model(TINY, WAYS["frozen"], 0, "cpu", None)
    frozen = {name.split(".")[-2] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == set(WAYS["frozen"].frozen)


def steps_of(optimizer: Any, weight: Tensor, grads: list[Tensor]) -> Tensor:
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    return weight.detach()


def reference(start: Tensor, grads: list[Tensor]) -> Tensor:
    weight = torch.nn.Parameter(start.clone())
    return steps_of(torch.optim.AdamW([weight], 1e-2, BETAS, weight_decay=WEIGHT_DECAY), weight, grads)


def ours(start: Tensor, grads: list[Tensor], size: int, moments: str) -> Tensor:
    weight = torch.nn.Parameter(start.clone())
    return steps_of(FoldedAdamW([weight], 1e-2, {weight: size}, moments), weight, grads)


def random_steps() -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    start, *grads = torch.randn(5, 6, 16, generator=generator, dtype=torch.float64)
    return start, grads


@pytest.mark.parametrize("moments", ["folded", "projected", "both"])
def test_folded_adamw_with_sub_tokens_of_one_is_adamw(moments: str) -> None:
    start, grads = random_steps()
    torch.testing.assert_close(ours(start, grads, 1, moments), reference(start, grads), rtol=1e-9, atol=1e-9)


def test_folded_moments_change_nothing_where_a_sub_token_has_one_magnitude() -> None:
    start, grads = random_steps()
    even = [grad.sign() * grad.abs().reshape(6, 4, 4).amax(-1).repeat_interleave(4, -1) for grad in grads]
    torch.testing.assert_close(ours(start, even, 4, "folded"), reference(start, even), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(ours(start, grads, 4, "folded"), reference(start, grads))


def test_both_moments_projected_are_adamw_of_the_compressed_gradient() -> None:
    """The gradient that a linear compressed with these signs has, as velora_fx computes it, stepped by PyTorch."""
    start, _ = random_steps()
    v = sign_projection(0, "moments", "0", 4, 4, torch.float64)
    generator = torch.Generator().manual_seed(1)
    exact, compressed = [], []
    for _ in range(4):
        x, dy = (torch.randn(9, width, generator=generator, dtype=torch.float64) for width in (16, 6))
        exact.append(dy.T @ x)
        compressed.append(((dy.T @ compress_sub_tokens(x, v))[..., None] * v).reshape(6, 16))
    torch.testing.assert_close(ours(start, exact, 4, "both"), reference(start, compressed), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(ours(start, exact, 4, "projected"), reference(start, compressed))


def test_the_rate_rises_in_a_line_and_falls_in_a_cosine() -> None:
    shares = [share_of_rate(step, 100) for step in range(100)]
    assert shares[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert shares[10] == 1 and shares[55] == pytest.approx(0.55) and 0.1 < shares[99] < 0.102
    assert shares[10:] == sorted(shares[10:], reverse=True)


def test_each_way_counts_at_its_own_best_rate_and_a_diverged_one_is_the_worst() -> None:
    rows = [
        row_of("dense", 0, 1e-3, 3.0), row_of("dense", 1, 1e-3, 3.2), row_of("dense", 0, 2e-3, 3.5),
        row_of("signs-8", 0, 1e-3, 3.4), row_of("signs-8", 1, 1e-3, math.nan),
        row_of("signs-8", 0, 2e-3, 3.1), row_of("signs-8", 1, 2e-3, 3.4),
        row_of("signs-8", 0, 4e-3, 3.3), row_of("signs-8", 1, 4e-3, 3.5),
        row_of("signs-8", 1, 2e-3, 3.25, equal_time=True, steps=5),
    ]  # fmt: skip
    dense, signs = results(rows)
    assert (dense.rate, dense.is_edge) == (1e-3, True) and dense.loss == pytest.approx(3.1)
    assert (signs.rate, signs.is_edge) == (2e-3, False)
    assert signs.over_dense == pytest.approx({0: 0.1, 1: 0.2}) and signs.equal_time == pytest.approx({1: 0.05})
    assert "+0.150 ±0.050" in tables(rows) and "+0.050" in tables(rows)


def test_rows_of_another_text_are_in_another_table() -> None:
    rows = [row_of("dense", loss=3.0), row_of("dense", loss=4.0, corpus="other"), row_of("signs-8", loss=3.1)]
    parts = tables(rows).split("pretrain-tiny")
    assert [part.count("\n| ") for part in parts[1:]] == [3, 2]


def test_the_price_of_a_size_is_the_longer_training_that_makes_up_for_it() -> None:
    def dense_loss(steps: float) -> float:
        return 5 - 0.5 * math.log(steps)

    wide = {"task": TASKS["pretrain-7m"], "task_name": "pretrain-7m"}
    rows = [row_of("dense", seed, loss=dense_loss(n), steps=n, **wide) for seed in (0, 1) for n in (100, 400)]
    longer = {2: 1.0, 4: 1.0, 8: 1.02, 16: 1.1, 32: 1.5}
    for size in SIZES:  # as good after 100 steps as dense after 100 / longer
        loss = dense_loss(100 / longer[size])
        rows += [row_of(f"signs-{size}", seed, loss=loss, steps=100, **wide) for seed in (0, 1)]
    found = fit(rows)
    assert found.slope == pytest.approx(0.5) and found.lengths == (100, 400)
    assert [found.shares[size] for size in (8, 16, 32)] == pytest.approx([0.02, 0.1, 0.5])
    assert 0 == found.shares[1] < found.shares[2] < found.shares[4] < 0.01
    narrow = fit([replace(row, task=TINY) for row in rows]).shares
    assert narrow[8] == 0.01 and narrow[16] == found.shares[16]


@pytest.mark.parametrize(("down", "says"), [((3.4, 3.6), True), ((3.0, 3.6), False)])
def test_kinds_of_layer_differ_where_all_seeds_of_one_are_above_another(down: tuple[float, float], says: bool) -> None:
    rows = [row_of("dense", seed, loss=loss, steps=n) for seed in (0, 1) for n, loss in ((100, 3.0), (400, 2.0))]
    for name, losses in {"": (3.1, 3.2), "-attention": (3.0, 3.1), "-down": down}.items():
        for size in (8, 32):
            rows += [row_of(f"signs-{size}{name}", seed, loss=losses[seed], steps=100) for seed in (0, 1)]
    text = fit_text(fit(rows))
    assert ("the kinds of layer differ beyond the spread at M = 8, 32" in text) == says
    assert "attention input +0.050 ±0.050, down input" in text


def test_too_few_rows_make_no_price(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--fit", "--results", str(tmp_path)]) == 1
    assert "in the ways dense and signs-8, signs-32 with 2 seeds each" in capsys.readouterr().err


def test_the_planners_prices_and_the_page_are_those_of_the_rows_in_the_repository() -> None:
    rows = read_rows(ROOT / "tools/results/quality.jsonl")
    assert fit(rows).shares == SHARES, "python tools/quality --publish writes them"
    assert shares_line(fit(rows)) in PRICE.read_text()
    assert with_tables(PAGE.read_text(), rows) == PAGE.read_text()


def test_figures_for_machines_are_those_of_the_table(tmp_path: Path) -> None:
    rows = [row_of("dense", loss=3.0), row_of("signs-8", loss=3.1)]
    (tmp_path / "quality.jsonl").write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    out = tmp_path / "figures.json"
    assert main(["--table", "--tasks", "pretrain-tiny", "--results", str(tmp_path), "--json", str(out)]) == 0
    dense, signs = json.loads(out.read_text())
    assert (dense["losses"], signs["over_dense"]) == ({"0": 3.0}, {"0": pytest.approx(0.1)})
