"""Texts of this machine as tokens: Python source or C headers of what is installed, split by file hash."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ENDINGS = {"python": (".py",), "headers": (".h", ".hpp", ".cuh")}
VALIDATION_SHARE = 0.05  # of all files
LARGEST_FILE, VOCABULARY_BYTES, MEGABYTE = 200_000, 8_000_000, 1_000_000


@dataclass(frozen=True)
class Tokens:
    """The tokens to train on and to validate on, int64 [N], or rows of labelled texts [N, 1 + length]; `corpus` is a
    hash of the text and the vocabulary."""

    train: Tensor
    validation: Tensor
    corpus: str


def cache_folder() -> Path:
    """Where tokens, vocabularies and start weights are kept by default."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "velora_fx" / "quality"


def load_tokens(text: str, words: int, megabytes: int, cache: Path) -> Tokens:
    """The tokens of a text in the byte-pair vocabulary of `words` words that Python source makes, from the cache if
    they are there."""
    chosen = _split(text, megabytes)
    vocabulary = chosen if text == "python" else _split("python", megabytes)
    names = sorted(digest for files in (*chosen.values(), vocabulary["train"]) for digest in files)
    corpus = hashlib.sha256("\n".join([text, str(words), *names]).encode()).hexdigest()[:12]
    file = cache / f"tokens-{corpus}.pt"
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        tokens = _tokenize(chosen, list(vocabulary["train"].values()), words)
        unfinished = file.with_suffix(f".{os.getpid()}")
        torch.save(tokens, unfinished)
        unfinished.replace(file)
    tokens = torch.load(file)
    return Tokens(tokens["train"].long(), tokens["validation"].long(), corpus)


def batch_at(tokens: Tensor, texts: int, length: int, generator: torch.Generator) -> Tensor:
    """A batch of texts from random places, [texts, length]; of rows of labelled texts, random ones."""
    if tokens.dim() == 2:
        return tokens[torch.randint(len(tokens), (texts,), generator=generator)]
    starts = torch.randint(len(tokens) - length, (texts,), generator=generator)
    return torch.stack([tokens[start : start + length] for start in starts.tolist()])


def validation_batches(tokens: Tensor, texts: int, length: int, most: int) -> Iterator[Tensor]:
    """The first batches of the text, one after the other without gaps, at most so many."""
    if tokens.dim() == 2:
        yield from torch.split(tokens[: most * texts], texts)
        return
    size = texts * length
    for start in range(0, min(most * size, len(tokens) - size + 1), size):
        yield tokens[start : start + size].view(texts, length)


def _split(text: str, megabytes: int) -> dict[str, dict[str, str]]:
    """Texts by the hash of their files, to train and to validate on: the first by hash, until there is enough."""
    files: dict[str, str] = {}
    for path in _paths(ENDINGS[text]):
        try:
            content = path.read_bytes()
            files[hashlib.sha256(content).hexdigest()] = content.decode()
        except (OSError, UnicodeDecodeError):
            continue
    chosen: dict[str, dict[str, str]] = {"train": {}, "validation": {}}
    left = {"train": megabytes * MEGABYTE, "validation": megabytes * MEGABYTE * VALIDATION_SHARE}
    for digest in sorted(files):
        # Not the digits that files are sorted by: both parts are to end.
        part = "validation" if int(digest[-8:], 16) < VALIDATION_SHARE * 16**8 else "train"
        if left[part] > 0:
            chosen[part][digest] = files[digest]
            left[part] -= len(files[digest])
    if not chosen["train"] or not chosen["validation"]:
        raise ValueError(f"there is no text to train on: no files {', '.join(ENDINGS[text])} among installed packages")
    return chosen


def _paths(endings: tuple[str, ...]) -> list[Path]:
    folders = {sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")}
    paths = {p for folder in folders for ending in endings for p in Path(folder).rglob(f"*{ending}")}
    return [path for path in sorted(paths) if path.is_file() and 0 < path.stat().st_size <= LARGEST_FILE]


def _tokenize(chosen: dict[str, dict[str, str]], vocabulary: list[str], words: int) -> dict[str, Tensor]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # not installed everywhere

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    size = 0
    learned_from = []
    for text in vocabulary:
        if size < VOCABULARY_BYTES:
            learned_from.append(text)
            size += len(text)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=words, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(learned_from, trainer)
    tokens = {}
    for part, files in chosen.items():
        ids = [[*encoding.ids, 0] for encoding in tokenizer.encode_batch(list(files.values()))]
        tokens[part] = torch.tensor([i for text in ids for i in text], dtype=torch.int32)
    return tokens
