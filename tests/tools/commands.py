"""Tools as they are called from a shell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
