"""The examples run as a stranger would run them, and what they print shows that compression was in effect."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PEAKS = re.compile(r"peak: untouched ([\d.]+) MiB, predicted ([\d.]+) MiB, measured ([\d.]+) MiB")
LOSSES = re.compile(r"loss ([\d.]+) -> ([\d.]+)")
TESTED = {
    "plain_loop.py": r"compressed [1-9]\d* of \d+ matmul inputs",
    "compiled.py": r"compressed [1-9]\d* of \d+ matmul inputs",
    "lora_peft.py": r"gradients of [1-9]\d* weights are approximate, for example of .*lora_[AB]",
    "huggingface_trainer.py": r"gradients of [1-9]\d* weights are approximate",
    "factored.py": r"gradients and AdamW's moments of [1-9]\d* weights are ([2-9]|\d\d+)\.\d times smaller",
    "fsdp2.py": r"equal within each sub-token of \S+: True",
}
WITHOUT_PEAKS = ("huggingface_trainer.py", "fsdp2.py")  # a Trainer's step is its own; a plan is of the unsharded model

LONG = ("compiled.py", "factored.py", "fsdp2.py", "huggingface_trainer.py", "lora_peft.py")


def printed_by(name: str) -> str:
    """What an example prints in a process of its own, without the network."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], capture_output=True, text=True, env=environment, timeout=600
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in TESTED]
)
def test_an_example_trains_with_compression(name: str) -> None:
    text = printed_by(name)
    assert re.search(TESTED[name], text), text
    losses = LOSSES.search(text)
    assert losses is not None, text
    assert float(losses[2]) < float(losses[1])
    if name not in WITHOUT_PEAKS:
        found = PEAKS.search(text)
        assert found is not None, text
        untouched, predicted, measured = map(float, found.groups())
        assert abs(predicted / measured - 1) <= 0.03
        assert measured < 0.97 * untouched


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(TESTED)


def test_examples_are_short() -> None:
    assert [path.name for path in EXAMPLES.glob("*.py") if len(path.read_text().splitlines()) >= 60] == []
