"""The encoder of tools/quality that tells packages by their docstrings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertConfig, BertModel

import tools.quality.docstrings as docstrings
from tools.quality.data import Tokens, batch_at, validation_batches
from tools.quality.docstrings import LONGEST, batch_of_labelled, load_docstrings, model_folder
from tools.quality.models import batch_of, compress, make_model
from tools.quality.rows import Row
from tools.quality.train import run
from tools.quality.ways import TASKS, WAYS, Shape

WORDS, LENGTH = 64, 12
TASK = replace(TASKS["minilm"], shape=Shape(32, 2, 64, 2, WORDS), texts=4, length=LENGTH, steps=4, model="tiny_encoder")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed package that holds a small encoder and its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path / "tiny_encoder" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": LENGTH,
    }  # fmt: skip
    encoder = BertModel(BertConfig(**sizes))
    encoder.config.save_pretrained(folder)
    weights = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    save_file({**weights, "embeddings.position_ids": torch.arange(LENGTH)[None]}, folder / "model.safetensors")
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "the": 2, "tensor": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    monkeypatch.syspath_prepend(str(tmp_path))
    return "tiny_encoder"


def labelled_rows() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, WORDS, (40, LENGTH), generator=generator)
    ids[:, 8:] = 0
    return torch.cat([torch.randint(docstrings.PACKAGES, (40, 1), generator=generator), ids], 1)


def test_a_missing_model_is_asked_for_by_its_name() -> None:
    with pytest.raises(ValueError, match="the pre-trained model is missing: pip install no-such-encoder"):
        model_folder("no_such_encoder")


def test_rows_are_labels_and_tokens_that_zeros_fill_up() -> None:
    batch = batch_of_labelled(labelled_rows())
    assert batch["labels"].shape == (40,) and batch["input_ids"].shape == (40, LENGTH)
    assert batch["attention_mask"].sum(1).tolist() == [8] * 40


def test_batches_are_whole_rows_and_validation_takes_each_once() -> None:
    rows = labelled_rows()
    drawn = batch_at(rows, 5, LENGTH, torch.Generator().manual_seed(0))
    assert all(any(torch.equal(row, one) for one in rows) for row in drawn)
    held_out = list(validation_batches(rows, 4, LENGTH, most=3))
    assert torch.equal(torch.cat(held_out), rows[:12])


def test_docstrings_are_those_of_the_largest_packages_each_once(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "The tensor of " + "the tensor " * 90
    for name, count in (("large", 3), ("small", 1)):
        folder = tmp_path / "installed" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        (folder / "broken.py").write_text("def f(:")
        for number in range(count):
            functions = "\n".join(f'def f{n}():\n    """{name} {number} {n}: {text}"""\n' for n in range(9))
            (folder / f"{number}.py").write_text(f'{functions}\ndef g():\n    """Short."""\n')
    places = {"purelib": str(tmp_path / "installed"), "platlib": str(tmp_path / "installed")}
    monkeypatch.setattr(docstrings.sysconfig, "get_paths", lambda: places)
    assert [folder.name for folder in docstrings._largest_packages()] == ["large", "small"]
    found = list(docstrings._docstrings(tmp_path / "installed" / "small"))
    assert len(found) == 9 and all(len(one) == LONGEST and one.startswith("small 0") for one in found)
    tokens = load_docstrings(package, LENGTH, tmp_path / "cache")
    rows = torch.cat([tokens.train, tokens.validation])
    assert rows.shape == (36, 1 + LENGTH) and rows[:, 0].bincount().tolist() == [27, 9]
    assert tokens.corpus == load_docstrings(package, LENGTH, tmp_path / "cache").corpus


ATTENTION = tuple(f"attention.self.{name}.weight" for name in ("query", "key", "value"))
NAMED = {
    "signs-8": {*ATTENTION, "intermediate.dense.weight", "output.dense.weight"},
    "mean-8-v+down": {ATTENTION[2], "output.dense.weight"},
    "signs-8-attention": {*ATTENTION},
}


@pytest.mark.parametrize("way", NAMED)
def test_ways_compress_the_linears_of_an_encoder_that_do_what_theirs_do(package: str, way: str) -> None:
    dense, ours = (make_model(TASK, WAYS[way], 0, "cpu", None) for _ in range(2))
    batch = batch_of(TASK, labelled_rows()[:4])
    assert compress(ours, TASK, WAYS[way], batch, 0) == 2 * len(NAMED[way])
    for model in (dense, ours):
        torch.manual_seed(0)  # of dropout
        model(**batch).loss.backward()
    found = dict(ours.named_parameters())
    differing = {
        name.split(".layer.")[-1].partition(".")[2]
        for name, parameter in dense.named_parameters()
        if not torch.allclose(parameter.grad, found[name].grad, rtol=1e-4, atol=1e-7)
    }
    assert differing == NAMED[way]


def test_a_run_trains_the_encoder(package: str) -> None:
    rows = labelled_rows()
    row = Row("minilm", TASK, "signs-8", WAYS["signs-8"], "cpu", "text", 0, 1e-3, TASK.steps)
    done = run(row, Tokens(rows, rows, "text"), Path())
    assert done.error is None and done.loss is not None and done.num_compressed == 10
