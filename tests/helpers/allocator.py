"""The real CPU allocator as an oracle."""

from __future__ import annotations

from collections.abc import Callable

from torch._C._profiler import _EventType
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
    """The bytes in use after each allocation, free and point, in order of time.

    Only what the step allocated itself counts when it is freed: at an address that it saw in an earlier profile, the
    profiler reports the end of what was there then.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    pending = list(profiler.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    events: list[tuple[int, str, int, int]] = []
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == _EventType.Allocation:
            events.append((event.start_time_ns, event.name, event.extra_fields.ptr, event.extra_fields.alloc_size))
        elif event.name == POINT:
            events.append((event.start_time_ns, POINT, 0, 0))
    totals: list[tuple[str, int]] = []
    held: dict[int, int] = {}
    current = 0
    for _, name, address, size in sorted(events):
        if size > 0:
            held[address] = size
        current += size if size > 0 else -held.pop(address, 0)
        totals.append((name, current))
    return totals
