"""Which saved tensors can be compressed, and why the others cannot."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from velora_fx.analyse.trial import Findings, Use, full_name
from velora_fx.plans import Skipped
from velora_fx.simulate import Saving, Timeline

LARGEST_SUB_TOKEN = 128
Key = tuple[str, str]  # region and name of a linear in it


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
    reasons = {key: use.reason or exclusion(use) for key, use in findings.uses.items()}
    allowed = {key for key, reason in reasons.items() if reason is None}
    inputs = _compressible(findings, sizes, reasons, is_factored)
    candidates = tuple(_candidate(groups, findings, sizes, num_weights) for groups in inputs)
    chosen = {key for groups in inputs for key in _linears(groups)}
    skipped = tuple(
        Skipped(full_name(*key), reason or "its input is not kept for backward")
        for key, reason in reasons.items()
        if key not in chosen
    )
    kept_anyway = [saving for saving in _kept_in_forward(findings) if _linear(saving) in allowed - chosen]
    others = _sharing(kept_anyway, findings, sizes, num_weights)
    if is_factored:
        known = chosen | set(map(_linear, kept_anyway))
        unkept = [saving for key, saving in findings.inputs.items() if key in allowed - known]
        shrinking = _sharing(unkept, findings, sizes, num_weights)
        others = (*others, *(replace(candidate, is_recomputed=True) for candidate in shrinking))
    return candidates, others, skipped


def _compressible(
    findings: Findings, sizes: Sequence[int] | None, reasons: dict[Key, str | None], is_factored: bool
) -> list[list[list[Saving]]]:
    """The inputs that can be compressed, those of one set of linears together; `reasons` gets why the others cannot."""
    by_storage: dict[int, list[Saving]] = {}
    for saving in findings.savings:
        by_storage.setdefault(saving.storage, []).append(saving)
    together: dict[tuple[Key, ...], list[list[Saving]]] = {}
    for savings in by_storage.values():
        linear = [saving for saving in savings if saving.consumer is not None]
        if not linear or (is_factored and all(findings.uses[key].is_recomputed for key in _linears([linear]))):
            continue
        blocked = _untimely(findings, savings[0].storage) or _blocked(savings, reasons) or _undivided(linear, sizes)
        if blocked is None:
            together.setdefault(tuple(_linears([linear])), []).append(linear)
        else:
            reasons.update({key: reasons[key] or blocked for key in _linears([linear])})
    for keys in together:
        if any(reasons[key] for key in keys):
            another = "another call of it saves an input that cannot be compressed"
            reasons.update({key: reasons[key] or another for key in keys})
    return [groups for keys, groups in together.items() if not any(reasons[key] for key in keys)]


def _linear(saving: Saving) -> Key:
    """Region and name of the linear that saves."""
    return saving.region, saving.consumer or ""


def _linears(groups: Iterable[Iterable[Saving]]) -> list[Key]:
    """Those of all savings, each once."""
    return list(dict.fromkeys(_linear(saving) for group in groups for saving in group))


def _kept_in_forward(findings: Findings) -> list[Saving]:
    """What linears save before backward begins."""
    assert findings.timeline is not None
    backward = {moment: start for start, moment in findings.timeline.marks}["backward"]
    return [
        saving
        for saving in findings.savings
        if saving.consumer is not None and findings.timeline.births[saving.storage] < backward
    ]


def _sharing(
    savings: Sequence[Saving],
    findings: Findings,
    sizes: Sequence[int] | None,
    num_weights: Callable[[str], int],
) -> tuple[Candidate, ...]:
    """What could be compressed although its input is kept anyway: one for each set of linears that read one input."""
    inputs: dict[tuple[str, str], list[Saving]] = {}
    for saving in savings:
        inputs.setdefault(_linear(saving), []).append(saving)
    together: dict[tuple[object, ...], list[Saving]] = {}
    for own in inputs.values():
        together.setdefault(tuple((s.region, s.x, s.storage) for s in own), []).extend(own)
    made = [_candidate([group], findings, sizes, num_weights) for group in together.values()]
    return tuple(replace(candidate, storages=(), bytes_before=0) for candidate in made if candidate.sizes)


def _untimely(findings: Findings, storage: int) -> str | None:
    """Why a storage cannot be freed that is there before the forward, or is made in backward."""
    timeline = findings.timeline
    assert timeline is not None
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


def _blocked(savings: Sequence[Saving], reasons: Mapping[Key, str | None]) -> str | None:
    others = list(dict.fromkeys(saving.operation for saving in savings if saving.consumer is None))
    if others:
        return f"input also saved by {', '.join(others)}"
    for key in map(_linear, savings):
        if key not in reasons:
            return f"input also saved by the frozen {full_name(*key)}"
        if reasons[key] is not None:
            return f"input also saved by {full_name(*key)}, which stays as it is"
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
    parameters = [findings.uses[_linear(saving)].weight for saving in savings]
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
