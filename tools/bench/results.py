"""What tools/bench ran on, and its rows for machines: written, and found again by a run that goes on."""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from tabulate import tabulate

from tools.bench.timing import Timing

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "torchao")
OF_A_RUN = ("command", "date")  # what is in a header and differs between two runs in one place
PLACES = re.compile(r" --(results|cache|compile-cache|plans)[ =]\S+")  # folders of one machine, in a command
LONGEST_CELL = 60
AnyRow = TypeVar("AnyRow", bound=Any)  # a frozen dataclass with an `error`


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
    bitsandbytes: str | None
    torchao: str | None

    def __str__(self) -> str:
        return "\n".join(f"{name:<17} {'-' if value is None else value}" for name, value in asdict(self).items())


def header_of(command: str, device: str) -> Header:
    """The header of a run that starts now; of the command without the folders that it names."""
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device()) if device == "cuda" else None
    versions = {package: _version(package) for package in PACKAGES}
    return Header(
        command=PLACES.sub("", command),
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


def rows_before(file: Path, header: Header, asked: Sequence[AnyRow]) -> list[AnyRow]:
    """Those of the rows that a file has already, with what was found: the last of each that was measured on the same
    machine, with the same versions, at the same commit.

    What a row was asked for are its fields without a default; the others are figures.
    """
    if not asked or not file.is_file():
        return []
    figures = [each.name for each in fields(asked[0]) if each.default is not MISSING]
    keys = {_key(asdict(row), figures): row for row in asked}
    found = {}
    for line in map(json.loads, file.read_text().splitlines()):
        row = keys.get(_key({each.name: line.get(each.name) for each in fields(asked[0])}, figures))
        if row is not None and _place(line["header"]) == _place(asdict(header)):
            values = {name: line[name] for name in figures if name in line}
            timings = {name: Timing(**value) for name, value in values.items() if isinstance(value, dict)}
            found[_key(asdict(row), figures)] = replace(row, **{**values, **timings})
    return list(found.values())


def _key(row: dict[str, Any], figures: Sequence[str]) -> str:
    return json.dumps({name: value for name, value in row.items() if name not in figures}, sort_keys=True)


def _place(header: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in header.items() if name not in OF_A_RUN}


def markdown(headers: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """A table of cells that are text already."""
    return tabulate([list(line) for line in body], list(headers), tablefmt="github", disable_numparse=True)


def milliseconds(timing: Timing | None) -> str:
    """The median with the distance between the quartiles, for a cell."""
    return "-" if timing is None else f"{timing.median_seconds * 1e3:.3f} ±{timing.spread_seconds * 1e3:.3f}"


def time_cell(row: Any) -> str:
    """Where the seconds of a row went, for a cell."""
    source = " (file)" if row.has_plan_file else ""
    return f"{row.planning_seconds:.1f}{source} + {row.compiling_seconds:.1f} + {row.steps_seconds:.1f}"


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
