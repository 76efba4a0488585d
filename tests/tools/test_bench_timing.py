"""Timings of tools/bench.py: what they are of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch


def test_timings_are_medians_with_the_distance_between_the_quartiles(tools: Any) -> None:
    timing = tools.bench_timing.timing_of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (timing.median_seconds, timing.min_seconds, timing.spread_seconds, timing.repeats) == (3.0, 1.0, 2.0, 5)


def test_inputs_are_taken_in_turn(tools: Any) -> None:
    taken: list[int] = []
    calls = [lambda number=number: taken.append(number) for number in range(3)]
    tools.bench_timing.timed(calls, "cpu", repeats=4, warm_up=2)
    assert taken == [0, 1, 2, 0, 1, 2]


class Clock:
    """Stands for torch.cuda: an event takes the number of steps so far for the milliseconds, and waits are kept."""

    def __init__(self) -> None:
        self.steps, self.waits = 0, list[int]()

    def step(self) -> None:
        self.steps += 1

    def synchronize(self) -> None:
        self.waits.append(self.steps)

    def Event(self, enable_timing: bool) -> Any:
        event = SimpleNamespace(at=0, elapsed_time=lambda later: float(later.at - event.at))
        event.record = lambda: setattr(event, "at", self.steps)
        return event


def test_training_steps_on_a_gpu_run_back_to_back(tools: Any, monkeypatch: Any) -> None:
    clock = Clock()
    monkeypatch.setattr(tools.bench_timing.torch, "cuda", clock)
    timing = tools.bench_timing.timed_steps(clock.step, "cuda", 3)
    assert clock.waits == [clock.steps]
    assert (timing.median_seconds, timing.spread_seconds, timing.repeats) == (1e-3, 0.0, 3)
    assert clock.steps == 1 + 3 * tools.bench_timing.STEPS_OF_A_TIME


def test_training_steps_on_a_cpu_are_timed_one_by_one(tools: Any) -> None:
    clock = Clock()
    assert tools.bench_timing.timed_steps(clock.step, "cpu", 3).repeats == 3
    assert clock.steps == 3 + 1


def test_results_of_operators_are_kept_until_they_fill_the_cache(tools: Any, monkeypatch: Any) -> None:
    """Freed at once, their memory would be written again while it is cached."""
    monkeypatch.setattr(tools.bench_timing, "CPU_ROTATED_BYTES", 2**12)
    row = tools.bench_ops.OpRow("expand", "cpu", tools.bench_ops.OpCase(8, 8, 8, "float32", 4), 1e10, 12)
    places: list[int] = []

    def contender(x: torch.Tensor) -> torch.Tensor:
        result = x.new_empty(256)
        places.append(result.data_ptr())
        return result

    tools.bench_ops._time(row, [contender], [(torch.ones(1),)])
    assert all(len(set(places[start : start + 4])) == 4 for start in range(1, len(places) - 4))
