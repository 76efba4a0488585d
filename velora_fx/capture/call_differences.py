"""In what a call differs from those that there are graphs for, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from velora_fx.capture.arguments import LEAF

ENOUGH = 4


def differences(key: tuple[Any, ...], known: Sequence[tuple[Any, ...]]) -> str:
    """What sets a call with this key apart from the one among the known keys that is most like it."""
    found = min((_between(key, other) for other in known), key=len, default=["there is no other"])
    more = [f"and {len(found) - ENOUGH} more"] if len(found) > ENOUGH else []
    return "; ".join([*found[:ENOUGH], *more])


def _between(key: tuple[Any, ...], other: tuple[Any, ...]) -> list[str]:
    (structure, leaves, modules, state, autocast, _), (_, _, old_modules, old_state, old_autocast, _) = key, other
    now, before = _named(structure, leaves), _named(*other[:2])
    found = [
        f"{name} is {_text(now[name]) if name in now else 'left out'}, not "
        f"{_text(before[name]) if name in before else 'left out'}"
        for name in {**before, **now}
        if now.get(name, LEAF) != before.get(name, LEAF)
    ]
    for part, old_part, what in ((modules, old_modules, "module"), (state, old_state, "parameter or buffer")):
        mine, old = {item[0]: item[1:] for item in part}, {item[0]: item[1:] for item in old_part}
        found += [f"the {what} {name} changed" for name in {**old, **mine} if mine.get(name) != old.get(name)]
    return [*found, "autocast"] if autocast != old_autocast else found


def _named(structure: Any, leaves: Sequence[Any]) -> dict[str, Any]:
    """The leaves of a call's arguments by name."""
    return dict(zip(_names(structure), leaves, strict=True))


def _names(structure: Any, prefix: str = "") -> Iterator[str]:
    if structure == LEAF:
        yield prefix
    elif not prefix:  # the pair of positional arguments and those by keyword
        positional, keywords = structure[1]
        for number, part in enumerate(positional[1]):
            yield from _names(part, f"argument {number}")
        for name, part in zip(keywords[1], keywords[2], strict=True):
            yield from _names(part, str(name))
    else:
        for name, part in zip(*structure[1:], strict=True) if structure[0] == "dict" else enumerate(structure[1]):
            yield from _names(part, f"{prefix}.{name}")


def _text(leaf: Any) -> str:
    if isinstance(leaf, tuple) and leaf[:1] == ("tensor",):
        return f"a {str(leaf[1]).removeprefix('torch.')} tensor of {leaf[-1]} dimensions on {leaf[2]}"
    return str(leaf)
