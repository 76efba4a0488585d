"""The real CPU allocator as an oracle."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile, record_function

POINT = "point of a step"


def peak_of(step: Callable[[], None]) -> int:
    """Peak bytes that the step allocates on the CPU, relative to its start."""
    return max((total for _, total in _totals(step)), default=0)


def totals_at_points(step: Callable[[], None]) -> list[int]:
    """Bytes that the step has allocated on the CPU, relative to its start, at each `point()` in it."""
    totals, found = 0, []
    for name, total in _totals(step):
        if name == POINT:
            found.append(totals)
        totals = total
    return found


def point() -> None:
    """A place in a step for `totals_at_points`."""
    with record_function(POINT):
        pass


def _totals(step: Callable[[], None]) -> list[tuple[str, int]]:
    """The bytes in use after each allocation, free and point, in order of time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() in ("[memory]", POINT)]  # type: ignore[union-attr]
    current, totals = 0, []
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes() if event.name() == "[memory]" else 0
        totals.append((event.name(), current))
    return totals
