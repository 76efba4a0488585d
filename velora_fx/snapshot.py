"""A simulated step in the format of PyTorch's memory snapshots."""

from __future__ import annotations

import pickle
from bisect import bisect
from pathlib import Path
from typing import Any

from velora_fx.timeline import Timeline

BASE_ADDRESS = 2**32
PROTOCOL = 4  # the newest that the page reads


def write_snapshot(timeline: Timeline, path: str | Path) -> None:
    """Writes the events of a step as a pickle that https://pytorch.org/memory_viz and `torch.cuda._memory_viz` read."""
    with open(path, "wb") as file:
        pickle.dump(snapshot_of(timeline), file, protocol=PROTOCOL)


def snapshot_of(timeline: Timeline) -> dict[str, Any]:
    """The events of a step as `torch.cuda.memory._snapshot` gives them, all in one segment of one device.

    What is there before the step is allocated first. The only frame of an allocation has the storage's label as name
    and its category as file. Addresses are made up.
    """
    live: dict[int, dict[str, Any]] = {}
    trace: list[dict[str, Any]] = []
    memory = _Memory()
    for storage, delta in zip(timeline.storages.tolist(), timeline.deltas.tolist(), strict=True):
        if delta > 0:
            category = timeline.category(storage)
            frames = [{"filename": category, "line": 0, "name": str(timeline.labels[storage])}]
            live[storage] = {"addr": memory.allocate(delta), "size": delta, "stream": 0, "frames": frames}
            trace.append({"action": "alloc", **live[storage], "category": category})
        elif delta < 0:
            freed = live.pop(storage)
            memory.free(freed["addr"], freed["size"])
            trace += [{"action": "free_requested", **freed}, {"action": "free_completed", **freed}]
    # The page fails on categories of which none is called unknown.
    trace.append({"action": "snapshot", "addr": 0, "size": 0, "stream": 0, "frames": [], "category": "unknown"})
    allocated = sum(block["size"] for block in live.values())
    segment = {
        "device": 0,
        "address": BASE_ADDRESS,
        "total_size": memory.size,
        "allocated_size": allocated,
        "active_size": allocated,
        "requested_size": allocated,
        "stream": 0,
        "segment_type": "large",
        "frames": [],
        "blocks": _blocks(list(live.values()), memory.size),
    }
    return {"segments": [segment], "device_traces": [trace]}


class _Memory:
    """Hands out addresses, the lowest that are free; `size` is how far it ever went."""

    def __init__(self) -> None:
        self.size = 0
        self._holes: list[tuple[int, float]] = [(BASE_ADDRESS, float("inf"))]

    def allocate(self, size: int) -> int:
        place = next(i for i, (start, end) in enumerate(self._holes) if end - start >= size)
        start, end = self._holes[place]
        self._holes[place : place + 1] = [(start + size, end)] if end > start + size else []
        self.size = max(self.size, start + size - BASE_ADDRESS)
        return start

    def free(self, start: int, size: int) -> None:
        end: float = start + size
        place = bisect(self._holes, (start, 0.0))
        if self._holes[place][0] == end:
            end = self._holes.pop(place)[1]
        if place and self._holes[place - 1][1] == start:
            start = self._holes.pop(place - 1)[0]
            place -= 1
        self._holes.insert(place, (start, end))


def _blocks(live: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """The blocks of the segment at the end of the step, those in use and the free ones between them."""
    blocks = []
    reached = BASE_ADDRESS
    for block in sorted(live, key=lambda block: int(block["addr"])):
        blocks += _free_block(reached, block["addr"])
        used = {"address": block["addr"], "size": block["size"], "requested_size": block["size"]}
        blocks.append({**used, "state": "active_allocated", "frames": block["frames"]})
        reached = block["addr"] + block["size"]
    return blocks + _free_block(reached, BASE_ADDRESS + size)


def _free_block(start: int, end: int) -> list[dict[str, Any]]:
    free = {"address": start, "size": end - start, "requested_size": 0, "state": "inactive", "frames": []}
    return [free] if end > start else []
