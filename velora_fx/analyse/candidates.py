"""Which saved tensors can be compressed, and why the others cannot."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from velora_fx.analyse.probe import Findings, Use
from velora_fx.plans import Skipped
from velora_fx.simulate import Saving, Timeline

LARGEST_SUB_TOKEN = 128


@dataclass(frozen=True)
class Candidate:
    """A saved tensor that only gradients of trainable weights need; compressing it frees `bytes_before`.

    That is 0, with no `storages`, for one that something else keeps too: compressing it saves time alone. `savings`
    names the linears that save it, or would if `is_recomputed` did not tell that it is made again in backward,
    `storages` the tracker's numbers of the storage in each call, `sizes`
    the sub-token sizes it may take, `num_weights` the entries of the weights whose gradient becomes approximate, and
    `weights_of` those of each saving's own weight.
    """

    region: str
    tensor: str
    savings: tuple[Saving, ...]
    storages: tuple[int, ...]
    bytes_before: int
    sizes: tuple[int, ...]
    num_weights: int
    weights_of: tuple[int, ...]
    is_recomputed: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """Region and tensor: the name of the candidate."""
        return self.region, self.tensor

    @property
    def consumers(self) -> tuple[str, ...]:
        """The dotted names of the linears."""
        return tuple(dict.fromkeys(full_name(saving.region, saving.consumer or "") for saving in self.savings))

    def bytes_after(self, size: int) -> int:
        """Bytes of the projections kept instead, one tensor for each input of each region."""
        if self.is_recomputed:
            return 0
        inputs = {(s.region, s.x, s.storage): s for s in self.savings}
        total = 0
        for saving in inputs.values():
            assert saving.dtype is not None
            total += torch.Size(saving.shape).numel() // size * saving.dtype.itemsize
        return total


def by_consumers(
    candidates: Iterable[Candidate], sizes: Mapping[tuple[str, str], int]
) -> list[tuple[tuple[str, ...], int]]:
    """The linears of each candidate that is compressed, with its sub-token size."""
    return [(candidate.consumers, sizes[candidate.key]) for candidate in candidates if candidate.key in sizes]


def full_name(region: str, part: str) -> str:
    """The dotted name of a part of a region."""
    return f"{region}.{part}" if region and part else region or part


def offered_sizes(width: int, wanted: Sequence[int] | None) -> tuple[int, ...]:
    """The sub-token sizes for a tensor of this width: the wanted ones that divide it, else the divisors from 2 to
    128 nearest to the powers of two."""
    divisors = [size for size in range(2, LARGEST_SUB_TOKEN + 1) if width % size == 0]
    if wanted is not None:
        return tuple(sorted({size for size in wanted if width % size == 0}))
    nearest = {min(divisors, key=lambda d: (abs(d - 2**power), d)) for power in range(1, 8)} if divisors else set()
    return tuple(sorted(nearest))


def find_candidates(
    findings: Findings,
    sizes: Sequence[int] | None,
    num_weights: Callable[[str], int],
    exclusion: Callable[[Use], str | None],
    is_factored: bool,
) -> tuple[tuple[Candidate, ...], tuple[Candidate, ...], tuple[Skipped, ...]]:
    """Sorts every product with a trainable parameter into candidates and skipped modules with their reasons.

    The second of the three are those of the skipped that could be compressed, but would free nothing; with
    `is_factored` also those whose input nothing keeps, as their gradients shrink all the same.
    `num_weights` gives the entries of a parameter by its dotted name, `exclusion` a reason to leave a product as it
    is, or None.
    """
    assert findings.timeline is not None
    reasons = {key: use.reason or exclusion(use) for key, use in findings.uses.items()}
    allowed = {key for key, reason in reasons.items() if reason is None}
    made_again = {key for key, use in findings.uses.items() if use.is_recomputed}
    by_storage: dict[int, list[Saving]] = {}
    for saving in findings.savings:
        by_storage.setdefault(saving.storage, []).append(saving)
    merged: dict[tuple[str, ...], list[list[Saving]]] = {}
    for savings in by_storage.values():
        linear = [saving for saving in savings if saving.consumer is not None]
        if not linear:
            continue
        if is_factored and all((saving.region, saving.consumer) in made_again for saving in linear):
            continue
        blocked = (
            _untimely(findings.timeline, savings[0].storage) or _blocked(savings, reasons) or _undivided(linear, sizes)
        )
        for saving in linear:
            key = (saving.region, saving.consumer or "")
            if blocked is not None:
                reasons[key] = reasons[key] or blocked
        if blocked is None:
            names = tuple(dict.fromkeys(f"{saving.region}/{saving.consumer}" for saving in linear))
            merged.setdefault(names, []).append(linear)
    for groups in merged.values():
        keys = [(s.region, s.consumer or "") for group in groups for s in group]
        if any(reasons[key] for key in keys):
            for key in keys:
                reasons[key] = reasons[key] or "another call of it saves an input that cannot be compressed"
    candidates = tuple(
        _candidate(groups, findings, sizes, num_weights)
        for groups in merged.values()
        if not any(reasons[s.region, s.consumer or ""] for group in groups for s in group)
    )
    chosen = {(s.region, s.consumer) for candidate in candidates for s in candidate.savings}
    skipped = tuple(
        Skipped(full_name(*key), reason or "its input is not kept for backward")
        for key, reason in reasons.items()
        if key not in chosen
    )
    backward = {moment: start for start, moment in findings.timeline.marks}["backward"]
    kept_anyway = [
        saving
        for saving in findings.savings
        if (saving.region, saving.consumer) in allowed - chosen and findings.timeline.births[saving.storage] < backward
    ]
    others = _sharing(kept_anyway, findings, sizes, num_weights)
    if is_factored:
        known = chosen | {(saving.region, saving.consumer) for saving in kept_anyway}
        unkept = [saving for key, saving in findings.inputs.items() if key in allowed - known]
        shrinking = _sharing(unkept, findings, sizes, num_weights)
        others = (*others, *(replace(candidate, is_recomputed=True) for candidate in shrinking))
    return candidates, others, skipped


def _sharing(
    savings: Sequence[Saving],
    findings: Findings,
    sizes: Sequence[int] | None,
    num_weights: Callable[[str], int],
) -> tuple[Candidate, ...]:
    """What could be compressed although its input is kept anyway: one for each set of linears that read one input."""
    inputs: dict[tuple[str, str], list[Saving]] = {}
    for saving in savings:
        inputs.setdefault((saving.region, saving.consumer or ""), []).append(saving)
    together: dict[tuple[object, ...], list[Saving]] = {}
    for own in inputs.values():
        together.setdefault(tuple((s.region, s.x, s.storage) for s in own), []).extend(own)
    made = [_candidate([group], findings, sizes, num_weights) for group in together.values()]
    return tuple(replace(candidate, storages=(), bytes_before=0) for candidate in made if candidate.sizes)


def _untimely(timeline: Timeline, storage: int) -> str | None:
    """Why a storage cannot be freed that is there before the forward, or is made in backward."""
    moments = {moment: start for start, moment in timeline.marks}
    birth = timeline.births[storage]
    if birth < moments["forward"]:
        return "its input is an input of the model, which the caller holds"
    if birth >= moments["backward"]:
        return "its input is recomputed in backward (activation checkpointing), so it is not kept"
    return None


def _undivided(linear: Sequence[Saving], sizes: Sequence[int] | None) -> str | None:
    """Why no sub-token size fits all of these linears."""
    if offered_sizes(common_width(linear), sizes):
        return None
    first, *others = dict.fromkeys(saving.shape[-1] for saving in linear)
    views = f", and {', '.join(map(str, others))} of other views of its storage" if others else ""
    return f"no sub-token size from {tuple(sizes) if sizes else '2 to 128'} divides its input width {first}{views}"


def common_width(savings: Sequence[Saving]) -> int:
    """The largest number that divides the widths of all inputs: views of one storage may differ in theirs."""
    return math.gcd(*(saving.shape[-1] for saving in savings))


def _blocked(savings: list[Saving], reasons: dict[tuple[str, str], str | None]) -> str | None:
    others = list(dict.fromkeys(saving.operation for saving in savings if saving.consumer is None))
    if others:
        return f"input also saved by {', '.join(others)}"
    for saving in savings:
        if (saving.region, saving.consumer) not in reasons:
            return f"input also saved by the frozen {full_name(saving.region, saving.consumer or '')}"
        if reasons[saving.region, saving.consumer or ""] is not None:
            return f"input also saved by {full_name(saving.region, saving.consumer or '')}, which stays as it is"
    return None


def _candidate(
    groups: list[list[Saving]],
    findings: Findings,
    sizes: Sequence[int] | None,
    num_weights: Callable[[str], int],
) -> Candidate:
    timeline = findings.timeline
    assert timeline is not None
    savings = tuple(saving for group in groups for saving in group)
    storages = tuple(dict.fromkeys(saving.storage for saving in savings))
    first = savings[0]
    parameters = [findings.uses[s.region, s.consumer or ""].weight for s in savings]
    return Candidate(
        first.region,
        full_name(first.consumer or "", "input"),
        savings,
        storages,
        sum(bytes_of(timeline, storage) for storage in storages),
        offered_sizes(common_width(savings), sizes),
        sum(num_weights(name) for name in dict.fromkeys(parameters)),
        tuple(num_weights(name) for name in parameters),
    )


def weight_names(savings: Sequence[Saving], findings: Findings) -> tuple[str, ...]:
    """The first dotted names of the weights whose gradients take what is saved, each once."""
    uses = (findings.uses[saving.region, saving.consumer] for saving in savings if saving.consumer is not None)
    return tuple(dict.fromkeys(use.weight for use in uses))


def bytes_of(timeline: Timeline, storage: int) -> int:
    """The bytes of a storage."""
    return int(timeline.deltas[timeline.births[storage]])
