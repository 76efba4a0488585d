"""Tools as they are called from a shell."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def ran(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What `python tools/<tool>` printed and ended with, called in another folder than the checkout."""
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool), *arguments],
        cwd=ROOT.parent,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def assert_refused(main: Callable[[list[str]], object], arguments: list[str], capsys: Any, *complaints: str) -> None:
    """The command ends with code 2 and the complaints, and has printed nothing else."""
    with pytest.raises(SystemExit) as left:
        main(arguments)
    printed = capsys.readouterr()
    assert (left.value.code, printed.out) == (2, "")
    assert all(complaint in printed.err for complaint in complaints), printed.err
