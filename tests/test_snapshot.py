"""A plan as a memory snapshot: PyTorch's own tools read it, and a replay of it is the planned step."""

from __future__ import annotations

import copy
import pickle
import pickletools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from torch.cuda import _memory_viz

import velora_fx
from tests.gradients import tightest
from tests.test_timeline import few, histories, replay
from tests.toys import rows, stack
from velora_fx.snapshot import BASE_ADDRESS, snapshot_of
from velora_fx.timeline import CATEGORIES

OPTIONS = {"device": "cuda", "optimizer": "adamw"}
# Opcodes that the unpickler of https://pytorch.org/memory_viz knows (torch/utils/viz/MemoryViz.js).
KNOWN_OPCODES = {
    "APPEND", "APPENDS", "BINFLOAT", "BINGET", "BININT", "BININT1", "BININT2", "BINPUT", "BINUNICODE", "DICT",
    "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "FRAME", "LIST", "LONG1", "LONG_BINGET", "LONG_BINPUT", "MARK",
    "MEMOIZE", "NEWFALSE", "NEWTRUE", "NONE", "PROTO", "SETITEM", "SETITEMS", "SHORT_BINUNICODE", "STOP", "TUPLE",
    "TUPLE1", "TUPLE2", "TUPLE3",
}  # fmt: skip


@pytest.fixture(scope="module")
def plan() -> velora_fx.Plan:
    return tightest(stack(), (rows(),), **OPTIONS)


@pytest.fixture(scope="module")
def path(plan: velora_fx.Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("snapshot") / "plan.pickle"
    plan.snapshot(path)
    return path


@pytest.fixture(scope="module")
def snapshot(path: Path) -> Any:
    return pickle.loads(path.read_bytes())


def totals_of(trace: list[dict[str, Any]]) -> list[int]:
    """Bytes in use after each allocation and free; no two allocations in use overlap."""
    live: dict[int, int] = {}
    totals = [0]
    for event in trace:
        if event["action"] == "alloc":
            start, end = event["addr"], event["addr"] + event["size"]
            assert all(end <= other or other + size <= start for other, size in live.items())
            live[start] = event["size"]
        elif event["action"] == "free_completed":
            assert live.pop(event["addr"]) == event["size"]
        totals.append(sum(live.values()))
    return totals


def test_a_replay_reaches_exactly_the_planned_peak(plan: velora_fx.Plan, snapshot: Any) -> None:
    assert plan.overhead_bytes > 0
    assert max(totals_of(snapshot["device_traces"][0])) == plan.planned.peak_bytes - plan.overhead_bytes


def test_the_segment_holds_at_the_end_what_the_replay_ends_with(snapshot: Any) -> None:
    (segment,) = snapshot["segments"]
    used = [block for block in segment["blocks"] if block["state"] == "active_allocated"]
    assert sum(block["size"] for block in used) == totals_of(snapshot["device_traces"][0])[-1]
    assert sum(block["size"] for block in segment["blocks"]) == segment["total_size"]
    names = {block["frames"][0]["name"] for block in used}
    assert {"blocks.0.up.weight", "gradient of head.bias", "exp_avg of blocks.2.norm.weight"} <= names


def test_tensors_have_the_names_of_their_modules_and_their_category(snapshot: Any) -> None:
    allocations = [event for event in snapshot["device_traces"][0] if event["action"] == "alloc"]
    names = {event["frames"][0]["name"]: event["category"] for event in allocations}
    assert names["head: linear [4, 8, 4] float32"] == "activations"
    assert names["blocks.0: compress [4, 8, 1] float32"] == "activations"
    assert names["gradient of blocks.1.up.weight"] == "gradients"
    assert names["exp_avg of blocks.1.up.weight"] == "optimizer"
    assert names["optimizer step: foreach_sqrt [64, 32] float32"] == "temporary"
    assert set(names.values()) <= set(CATEGORIES)


def test_pytorchs_own_tools_read_it(plan: velora_fx.Plan, snapshot: Any) -> None:
    num_frees = sum(event["action"] == "free_completed" for event in snapshot["device_traces"][0])
    assert _memory_viz.trace(copy.deepcopy(snapshot)).count("# free completed") == num_frees > 0
    (segment,) = snapshot["segments"]
    assert f"total_reserved: {_memory_viz.Bytes(segment['total_size'])}" in _memory_viz.segsum(snapshot)
    for page in (_memory_viz.trace_plot(snapshot), _memory_viz.segment_plot(snapshot)):
        assert "snapshot.pickle" in page
    lines: list[str] = []
    _memory_viz.memory(snapshot, format_flamegraph=lines.append)
    assert ";active_allocated;parameters:0:head.weight 512" in lines[0]


def test_every_block_lies_in_the_segment_and_one_category_is_unknown(snapshot: Any) -> None:
    """The page has no answer to anything else."""
    (segment,) = snapshot["segments"]
    trace = snapshot["device_traces"][0]
    for event in trace:
        if event["action"] != "snapshot":
            assert segment["address"] <= event["addr"]
            assert event["addr"] + event["size"] <= segment["address"] + segment["total_size"]
    assert "unknown" in {event["category"] for event in trace if "category" in event}


def test_the_page_knows_every_opcode_and_number(path: Path) -> None:
    for opcode, argument, _ in pickletools.genops(path.read_bytes()):
        assert opcode.name in KNOWN_OPCODES
        assert opcode.name != "PROTO" or 2 <= argument <= 4
        assert opcode.name != "LONG1" or abs(argument) < 2**53


@few
@given(histories())
def test_any_history_is_replayed_event_by_event(history) -> None:  # type: ignore[no-untyped-def]
    snapshot = snapshot_of(history.timeline)
    totals = totals_of([e for e in snapshot["device_traces"][0] if e["action"] != "free_requested"][:-1])
    sizes = [sum(live.values()) for (_, delta), live in zip(history.events, replay(history), strict=True) if delta]
    assert totals == [0, *sizes]
    _memory_viz.segsum(snapshot)  # checks the blocks of the segment


@few
@given(histories())
def test_an_allocation_gets_the_lowest_address_where_it_fits(history) -> None:  # type: ignore[no-untyped-def]
    live: dict[int, int] = {}
    for event in snapshot_of(history.timeline)["device_traces"][0]:
        if event["action"] == "alloc":
            size = event["size"]
            ends = [BASE_ADDRESS, *(start + length for start, length in live.items())]
            free = [a for a in ends if all(a + size <= start or start + live[start] <= a for start in live)]
            assert event["addr"] == min(free)
            live[event["addr"]] = size
        elif event["action"] == "free_completed":
            del live[event["addr"]]


def test_the_plan_of_an_optimised_model_has_its_events_and_copies_of_it_say_where_they_went(tmp_path: Path) -> None:
    model = velora_fx.optimize(stack(), 1, (rows(),))
    plan = velora_fx.plan_of(model)
    plan.snapshot(tmp_path / "plan.pickle")
    for bare in (
        velora_fx.Plan.from_json(plan.to_json()),
        copy.deepcopy(plan),
        velora_fx.plan_of(copy.deepcopy(model)),
        velora_fx.plan_of(pickle.loads(pickle.dumps(model))),
    ):
        assert bare == plan
        with pytest.raises(ValueError, match=r"no events: it was copied, or read from JSON or a pickle"):
            bare.snapshot(tmp_path / "bare.pickle")
    assert not (tmp_path / "bare.pickle").exists()


def test_equal_labels_are_one_object() -> None:
    """Large steps have few of them."""
    timeline = velora_fx.plan(stack(), 1, (rows(),)).planned.timeline
    assert timeline is not None
    assert len({id(label) for label in timeline.labels}) == len(set(timeline.labels)) < len(timeline.labels)
