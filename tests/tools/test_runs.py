"""Rows of the tools: measured in processes of their own, in time, and not again by a run that goes on."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tools.bench.results import Header, append_rows, header_of, rows_before
from tools.bench.timing import Timing
from tools.runs import DIED, OVER, apart, end_of, run_rows


@dataclass(frozen=True)
class Row:
    """A row that takes some seconds."""

    name: str
    takes: float
    step: Timing | None = None
    text: str = ""
    error: str | None = None


def told(row: Row) -> Row:
    return replace(row, text=os.environ.get("OF_A_ROW", ""))


def slept(row: Row) -> Row:
    time.sleep(row.takes)
    return replace(row, text="slept")


class Deadly:
    """Ends the process in which it arrives."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (1,)


def test_a_process_that_dies_takes_only_its_own_row_with_it() -> None:
    assert apart(told, Row(Deadly(), 0)).error == DIED  # type: ignore[arg-type]


def test_a_row_has_its_own_environment() -> None:
    assert apart(told, Row("one", 0), environment={"OF_A_ROW": "here"}).text == "here"
    assert "OF_A_ROW" not in os.environ


def test_a_row_that_is_not_done_in_time_is_ended() -> None:
    start = time.monotonic()
    row = apart(slept, Row("long", 600), until=start + 0.1)
    assert (row.error, row.text) == (OVER, "") and time.monotonic() - start < 60


def test_what_would_not_end_in_time_is_left_out_and_shorter_rows_are_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0

    def measure(row: Row) -> Row:
        nonlocal now
        now += row.takes
        return row

    monkeypatch.setattr(time, "monotonic", lambda: now)
    asked = [Row("long", 40), Row("short", 10), Row("long", 40), Row("long", 40), Row("short", 10), Row("new", 1)]
    appended: list[Row] = []
    done, left = run_rows(asked, measure, appended.append, "rows", 100, lambda row: row.name, {"new": 50.0})
    assert done == appended == [asked[0], asked[1], asked[2]] and now == 90
    assert left == [asked[3], asked[4], asked[5]]
    assert "the time is over: rows goes on with Row(name='long'" in capsys.readouterr().err


def test_without_minutes_there_is_no_end() -> None:
    asked = [Row("one", 1e9)]
    assert run_rows(asked, lambda row: row, lambda row: None, "rows", end_of(None)) == (asked, [])
    assert run_rows(asked, lambda row: row, lambda row: None, "rows", end_of(0)) == ([], asked)


@pytest.fixture
def header() -> Header:
    return header_of("a command", "cpu")


def test_rows_of_the_same_place_are_found_again_with_their_figures(tmp_path: Path, header: Header) -> None:
    file = tmp_path / "rows.jsonl"
    asked = [Row("one", 1), Row("two", 2), Row("three", 3)]
    assert rows_before(file, header, asked) == []
    timing = Timing(0.1, 0.05, 0.01, 3)
    first, failed = replace(asked[0], step=timing, text="found"), replace(asked[1], error="OSError: no room")
    elsewhere = replace(header, machine="another")
    append_rows(file, header, [asdict(Row("one", 9)), asdict(failed), asdict(replace(first, text="before"))])
    append_rows(file, replace(header, command="again", date="later"), [{**asdict(first), "derived": 1}])
    append_rows(file, elsewhere, [asdict(replace(asked[2], text="there"))])
    assert sorted(rows_before(file, header, asked), key=lambda row: row.takes) == [first, failed]
    assert [row.text for row in rows_before(file, elsewhere, asked)] == ["there"]
    assert rows_before(file, replace(header, commit="new"), asked) == []
    assert json.loads(file.read_text().splitlines()[0])["takes"] == 9


def test_a_header_names_no_folder_of_the_machine() -> None:
    header = header_of("tools/quality --results /a/b --quick --cache=/c/d", "cpu")
    assert header.command == "tools/quality --quick"
