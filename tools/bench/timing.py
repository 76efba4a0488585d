"""How long things take: medians of repeated calls, on inputs that are not in the cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from typing import Any, cast

import torch

MIB = 2**20
CPU_ROTATED_BYTES, L2_MULTIPLE = 64 * MIB, 4
COPY_BYTES = {"cpu": 64 * MIB, "cuda": 1024 * MIB}
CHUNK = 20  # calls in the queue of a GPU at once, far below the number where launching waits
STEPS_OF_A_TIME = 4
HEAD_START_CYCLES = 50_000_000  # about 30 ms of a GPU, in which the calls of a chunk are launched


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median, the least, and the distance between the quartiles."""

    median_seconds: float
    min_seconds: float
    spread_seconds: float
    repeats: int


class Stopwatch:
    """Tells the seconds between one look at it and the next."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last look, or since it was made."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        return seconds


def timing_of(seconds: Sequence[float]) -> Timing:
    """The statistics of repeated measurements."""
    first, _, third = statistics.quantiles(seconds, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    return Timing(statistics.median(seconds), min(seconds), third - first, len(seconds))


def timed(calls: Sequence[Callable[[], object]], device: str, repeats: int, warm_up: int = 3) -> Timing:
    """Times so many calls, taken in turn, after a few that do not count.

    On CUDA by events, and the GPU waits until calls are launched, so that the time is that of the kernels alone.
    """
    return timed_in_turn([calls], device, repeats, warm_up)[0]


def timed_steps(step: Callable[[], object], device: str, repeats: int) -> Timing:
    """Times a training step after one that does not count.

    On CUDA each time is the mean of a few steps, and all run back to back as in training: the GPU is idle only where
    launching is slower than it is.
    """
    if device == "cpu":
        return timed([step], device, repeats, warm_up=1)
    cuda = cast(Any, torch.cuda)  # whose events have no types
    events = [cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    step()
    events[0].record()
    for event in events[1:]:
        for _ in range(STEPS_OF_A_TIME):
            step()
        event.record()
    cuda.synchronize()
    return timing_of([first.elapsed_time(last) / 1e3 / STEPS_OF_A_TIME for first, last in pairwise(events)])


def timed_in_turn(
    contenders: Sequence[Sequence[Callable[[], object]]],
    device: str,
    repeats: int,
    warm_up: int = 3,
) -> list[Timing]:
    """`timed` for several contenders, who take turns, so that none has the luck of its place; each starts elsewhere
    among its calls, so that none finds in the cache what another left there."""
    turns = []
    for number, calls in enumerate(contenders):
        start = number * len(calls) // len(contenders)
        turns.append(cycle([*calls[start:], *calls[:start]]))
    for turn in turns:
        for call in islice(turn, warm_up):
            call()
    size = CHUNK if device == "cuda" else 1
    seconds: list[list[float]] = [[] for _ in contenders]
    for start in range(0, repeats, size):
        for turn, found in zip(turns, seconds, strict=True):
            found += _seconds_of(list(islice(turn, min(size, repeats - start))), device)
    return [timing_of(found) for found in seconds]


def _seconds_of(calls: Sequence[Callable[[], object]], device: str) -> list[float]:
    if device == "cuda":
        return _seconds_on_cuda(calls)
    return [_seconds_on_cpu(call) for call in calls]


def _seconds_on_cpu(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _seconds_on_cuda(calls: Sequence[Callable[[], object]]) -> list[float]:
    pairs, cuda = [], cast(Any, torch.cuda)  # whose events have no types
    torch.cuda.synchronize()
    cuda._sleep(HEAD_START_CYCLES)
    for call in calls:
        before, after = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        before.record()
        call()
        after.record()
        pairs.append((before, after))
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in pairs]


def copies_to_rotate(num_bytes: int, device: str) -> int:
    """How many copies of inputs of so many bytes are needed for none to be found in the cache."""
    if device == "cuda":
        cache_bytes = L2_MULTIPLE * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        return max(2, -(-cache_bytes // num_bytes))
    return max(2, CPU_ROTATED_BYTES // num_bytes)


def time_copy(num_bytes: int, device: str, repeats: int) -> Timing:
    """Times a `copy_` that moves so many bytes: half of them read and half of them written."""
    size = max(1, num_bytes // 2)
    pairs = [
        (torch.ones(size, dtype=torch.uint8, device=device), torch.ones(size, dtype=torch.uint8, device=device))
        for _ in range(copies_to_rotate(2 * size, device))
    ]
    return timed([lambda pair=pair: pair[0].copy_(pair[1]) for pair in pairs], device, repeats)  # type: ignore[misc]


def copy_bandwidth(device: str, repeats: int) -> float:
    """Bytes a second, read plus written, of the copy of a large tensor."""
    return COPY_BYTES[device] / time_copy(COPY_BYTES[device], device, repeats).median_seconds
