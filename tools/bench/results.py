"""What tools/bench ran on, and its rows for machines."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from tools.bench.timing import Timing

PACKAGES = ("torch", "triton", "transformers", "peft")
LONGEST_CELL = 60


@dataclass(frozen=True)
class Header:
    """The machine, the versions (None where a package is missing), the time and the commit of a run."""

    command: str
    date: str
    commit: str | None
    machine: str
    cpu: str
    threads: int
    gpu: str | None
    gpu_memory_bytes: int | None
    python: str
    cuda: str | None
    torch: str | None
    triton: str | None
    transformers: str | None
    peft: str | None

    def __str__(self) -> str:
        return "\n".join(f"{name:<17} {'-' if value is None else value}" for name, value in asdict(self).items())


def header_of(command: str, device: str) -> Header:
    """The header of a run that starts now."""
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device()) if device == "cuda" else None
    versions = {package: _version(package) for package in PACKAGES}
    return Header(
        command=command,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        commit=_commit(),
        machine=platform.platform(),
        cpu=_cpu_name(),
        threads=torch.get_num_threads(),
        gpu=None if gpu is None else gpu.name,
        gpu_memory_bytes=None if gpu is None else gpu.total_memory,
        python=platform.python_version(),
        cuda=torch.version.cuda,
        **versions,
    )


def require_appendable(file: Path) -> None:
    """Raises an OSError where rows cannot be appended to a file; makes its folder and leaves the file as it was."""
    file.parent.mkdir(parents=True, exist_ok=True)
    is_new = not file.exists()
    file.open("a").close()
    if is_new:
        file.unlink()


def append_rows(file: Path, header: Header, rows: Iterable[dict[str, Any]]) -> None:
    """Appends a line of JSON for each row, with the header's fields in it."""
    with file.open("a") as lines:
        lines.writelines(json.dumps({"header": asdict(header), **row}) + "\n" for row in rows)


def markdown(headers: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """A table of cells that are text already."""
    return tabulate([list(line) for line in body], list(headers), tablefmt="github", disable_numparse=True)


def milliseconds(timing: Timing | None) -> str:
    """The median with the distance between the quartiles, for a cell."""
    return "-" if timing is None else f"{timing.median_seconds * 1e3:.3f} ±{timing.spread_seconds * 1e3:.3f}"


def reason_of(error: Exception) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this checkout, with a plus for changes on top of it."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
