"""A progress bar for planning."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from tqdm import tqdm


@contextlib.contextmanager
def planning_progress() -> Iterator[Callable[[str], None]]:
    """A function to call with the name of each step of planning; a bar shows it on a terminal after two seconds."""
    with tqdm(disable=None, delay=2, leave=False, file=sys.stderr, unit="step", desc="planning") as bar:

        def step(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        yield step
