"""Plans made ahead of the rows that train by them: files that travel from a machine with time to one with a GPU."""

from __future__ import annotations

from pathlib import Path

import torch

from velora_fx import Plan


def plan_file(folder: Path, name: str) -> Path:
    """Where the plan of that name is kept: apart for each version of PyTorch, as `velora_fx.apply` wants it."""
    return folder / f"torch-{'.'.join(torch.__version__.split('.')[:2])}" / f"{name}.json"


def read_plan(folder: Path | None, name: str) -> Plan | None:
    """The plan of that name; None without a folder, a name or a file."""
    file = plan_file(folder, name) if folder is not None and name else None
    return Plan.from_json(file.read_text()) if file is not None and file.is_file() else None


def write_plan(folder: Path, name: str, plan: Plan) -> int:
    """Keeps a plan under a name; returns the bytes of its file."""
    file = plan_file(folder, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    return file.write_text(plan.to_json())
