#!/usr/bin/env python
"""`velora-plan` from a bare checkout: predicts and plans the memory of a training step; see --help."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("velora_fx") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from velora_fx.cli.main import command

if __name__ == "__main__":
    sys.exit(command())
