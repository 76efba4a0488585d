"""Rows that are measured one after the other: in processes of their own, none twice, none beyond the time there is."""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Hashable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from tqdm import tqdm

AnyRow = TypeVar("AnyRow", bound=Any)  # a frozen dataclass with an `error`
NO_END = math.inf
ENDING_SECONDS = 30.0
OVER, DIED = "stopped: the time was over", "its process died"


def end_of(minutes: float | None) -> float:
    """When so many minutes from now are over, by `time.monotonic`; without minutes never."""
    return NO_END if minutes is None else time.monotonic() + 60 * minutes


def run_rows(
    asked: Sequence[AnyRow],
    measure: Callable[[AnyRow], AnyRow],
    append: Callable[[AnyRow], None],
    label: str,
    until: float = NO_END,
    kind: Callable[[AnyRow], Hashable] = lambda row: None,
    longest: MutableMapping[Hashable, float] | None = None,
) -> tuple[list[AnyRow], list[AnyRow]]:
    """Measures rows in their order and appends each at once; returns those, and those for which there was no time.

    A row is expected to take as many seconds as the longest of its kind so far; one that would not end by `until` (of
    `time.monotonic`) is left out, and shorter ones after it are measured.
    """
    longest = {} if longest is None else longest
    done: list[AnyRow] = []
    left: list[AnyRow] = []
    for row in tqdm(asked, desc=label, unit="row", disable=None, file=sys.stderr):
        start = time.monotonic()
        if start + longest.get(kind(row), 0.0) >= until:
            left.append(row)
            continue
        done.append(measure(row))
        longest[kind(row)] = max(longest.get(kind(row), 0.0), time.monotonic() - start)
        append(done[-1])
    if left:
        print(f"the time is over: {label} goes on with {left[0]} ({len(left)} left)", file=sys.stderr)
    return done, left


def apart(
    measured: Callable[[AnyRow], AnyRow],
    row: AnyRow,
    until: float = NO_END,
    environment: Mapping[str, str] | None = None,
) -> AnyRow:
    """Measures a row in a process of its own, so that no cache, fragment or crash of one reaches another.

    The process has these variables in its environment besides. A row that has no result by `until` is ended.
    """
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sending, dict(environment or {}), measured, row))
    process.start()
    sending.close()
    is_there = False
    try:
        is_there = receiving.poll(None if until == NO_END else max(0.0, until - time.monotonic()))
        found: AnyRow = receiving.recv() if is_there else replace(row, error=OVER)
        return found
    except EOFError:
        return replace(row, error=DIED)
    finally:
        process.join(ENDING_SECONDS if is_there else 0.0)  # it gives back what it shares with this one
        process.kill()
        process.join()


def _send(sending: Connection, environment: dict[str, str], measured: Callable[[AnyRow], AnyRow], row: AnyRow) -> None:
    os.environ.update(environment)
    sending.send(measured(row))
