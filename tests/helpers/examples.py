"""Tests of many drawn examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st


def for_any(*drawn: st.SearchStrategy[Any], examples: int = 100, **named: Any) -> Callable[[Any], Any]:
    """Has a test called with examples of what the strategies draw, the same in each run, however long they take."""
    return lambda test: settings(max_examples=examples, deadline=None, derandomize=True)(given(*drawn, **named)(test))
