"""Which blocks can be recomputed in backward."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from velora_fx.analyse.trial import Findings
from velora_fx.capture import find_blocks
from velora_fx.passes.mutated_state import mutated_state
from velora_fx.runtime import LEVELS, Recompute


@dataclass(frozen=True)
class Block:
    """A block that can be run twice: its name, the bytes kept for its backward, and when all of them are alive.

    `first` is the event of the trial step from which on they are, `end` the one that frees the first of them, `levels`
    the ways in which it may be recomputed.
    """

    name: str
    kept_bytes: int
    first: int
    end: int
    levels: tuple[Recompute, ...] = LEVELS


def find_recomputable(
    model: torch.nn.Module, findings: Findings, is_compiled: bool, passed_by: Collection[str]
) -> tuple[Block, ...]:
    """The repeated blocks, in order, that keep something and whose forward does the same when it runs again.

    A forward that could not be captured may do anything; one that changes buffers would change them twice, and one
    whose inputs are written in place would start from others. Where results of matrix products are written in place,
    they cannot be what is kept: the block is recomputed whole, or not. A model in which nothing repeats is a block of
    its own, unless it is compiled: the compiler recomputes what is cheap as it is. `passed_by` is as in `find_blocks`.
    """
    timeline = findings.timeline
    assert timeline is not None
    owners: dict[int, set[str]] = {}
    for saving in findings.savings:
        owners.setdefault(saving.storage, set()).add(saving.region)
    kept: dict[str, list[int]] = {}
    for storage, regions in owners.items():
        if len(regions) == 1:  # a mask that all blocks keep is not freed by one
            kept.setdefault(next(iter(regions)), []).append(storage)
    recomputed = {use.region for use in findings.uses.values() if use.is_recomputed}
    blocks = []
    for name, module in find_blocks(model, passed_by).items():
        graphs = [graph.gm for graph in findings.graphs.get(name, ()) if graph.gm is not None]
        unfit = (
            (is_compiled and module is model)
            or name in findings.failures
            or name in recomputed
            or any(map(mutated_state, graphs))
            or name in findings.overwrites.inputs_of
        )
        if unfit or not graphs or name not in kept:
            continue
        storages = kept[name]
        starts = [findings.last_uses.get(storage, timeline.births[storage] + 1) for storage in storages]
        ends = [timeline.deaths.get(storage, len(timeline.deltas)) for storage in storages]
        num_bytes = -sum(int(timeline.deltas[timeline.deaths[s]]) for s in storages if s in timeline.deaths)
        if num_bytes and max(starts) < min(ends):
            levels: tuple[Recompute, ...] = ("all",) if name in findings.overwrites.results_of else LEVELS
            blocks.append(Block(name, num_bytes, max(starts), min(ends), levels))
    return tuple(blocks)
