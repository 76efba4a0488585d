"""Other names for blocks, in what is said of a step."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from velora_fx.simulate.timeline import Place, Timeline


def renaming(names: Mapping[str, str]) -> Callable[[str], str]:
    """Replaces the dotted names of blocks within a text."""
    changed = {old: new for old, new in names.items() if old != new}
    if not changed:
        return lambda text: text
    pattern = re.compile(r"(?<![\w.])(" + "|".join(map(re.escape, changed)) + r")(?![\w])")
    known: dict[str, str] = {}

    def rename(text: str) -> str:
        if text not in known:
            known[text] = pattern.sub(lambda found: changed[found[1]], text)
        return known[text]

    return rename


def renamed(timeline: Timeline, rename: Callable[[str], str]) -> Timeline:
    return replace(
        timeline,
        labels=tuple(label._replace(where=rename(label.where)) for label in timeline.labels),
        places=tuple(Place(event, rename(name), rename(scope)) for event, name, scope in timeline.places),
    )
