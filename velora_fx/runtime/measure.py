"""The real peak of a training step."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from velora_fx.devices import ALLOCATOR_BLOCK_BYTES
from velora_fx.peaks import Measured, Peak

Storages = dict[str, list[torch.UntypedStorage]]
MARKER_BYTES = 1


@contextlib.contextmanager
def measured_step(
    model: torch.nn.Module,
    predicted: Peak,
    device_type: str,
    done: Callable[[Measured], None],
    inputs: Mapping[int, int] | None = None,
) -> Iterator[None]:
    """Calls `done` with the real peak of the training step within, an optimizer's step included.

    `predicted` tells how many of the gradients are there at the peak. On CPU what was there before and is neither the
    model's nor the optimizer's is not counted, but for `inputs`: by then the bytes by address of what the model was
    called with. Raises ValueError for a model on other devices than one of
    `device_type`, RuntimeError where another profiler runs or no optimizer of the model stepped within.
    """
    device = device_of(model, device_type)
    if device.type == "cpu" and torch._C._autograd._profiler_enabled():
        raise RuntimeError("another profiler runs, and PyTorch has but one: end it before the step that is measured")
    before = _storages(model, (), device)
    gradients = [weakref.ref(storage) for storage in before["gradients"]]
    optimizers: dict[torch.optim.Optimizer, None] = {}
    ends: list[_End] = []

    def stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if _holds(optimizer, model):
            optimizers[optimizer] = None
            ends.append(_End(_storages(model, [*optimizers], device), gradients, device))

    handle = register_optimizer_step_post_hook(stepped)
    watch = _CudaWatch(device, before) if device.type == "cuda" else _CpuWatch(before)
    del before
    try:
        yield
    finally:
        watch.stop()
        handle.remove()
    if not ends:
        raise RuntimeError("no optimizer of the model stepped: measure around forward, backward and optimizer.step()")
    done(ends[-1].measured(predicted, *watch.peak(ends[-1], inputs or {})))


class _End:
    """What is there once the optimizer has stepped: bytes by category, of which gradients that were there before, and
    the optimizer's state by address. No storage is kept alive."""

    def __init__(
        self, storages: Storages, gradients: Sequence[weakref.ref[torch.UntypedStorage]], device: torch.device
    ) -> None:
        self.breakdown = {name: _bytes(group, device) for name, group in storages.items()}
        kept = {id(ref()) for ref in gradients} - {id(None)}
        self.kept_bytes = _bytes([storage for storage in storages["gradients"] if id(storage) in kept], device)
        self.states = {storage.data_ptr(): storage.nbytes() for storage in storages["optimizer"]}
        self.allocated_bytes = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    def measured(self, predicted: Peak, allocated: int, reserved: int | None, other: int | None) -> Measured:
        """The result; of the step's gradients as many as the plan has at its peak."""
        breakdown = dict(self.breakdown)
        new_bytes = breakdown["gradients"] - self.kept_bytes
        breakdown["gradients"] = self.kept_bytes + int(_gradients_at_peak(predicted) * new_bytes)
        if other is not None:
            breakdown["other"] = other
        breakdown["activations and temporary"] = max(0, allocated - sum(breakdown.values()))
        return Measured(allocated, reserved, breakdown)


def device_of(model: torch.nn.Module, device_type: str) -> torch.device:
    """The one device that a model is on; ValueError for several, or one of another type."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or {device.type for device in devices} != {device_type}:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"the plan is for one {device_type} device, and the model is on {names}: nothing is measured")
    return next(iter(devices))


class _CudaWatch:
    """The statistics of PyTorch's CUDA allocator, set back at the start."""

    def __init__(self, device: torch.device, storages: Storages) -> None:
        self.device = device
        torch.cuda.reset_peak_memory_stats(device)
        known_bytes = sum(_bytes(group, device) for group in storages.values())
        self.other_bytes = torch.cuda.memory_allocated(device) - known_bytes

    def stop(self) -> None:
        """Reads the peaks."""
        self.allocated = torch.cuda.max_memory_allocated(self.device)
        self.reserved = torch.cuda.max_memory_reserved(self.device)

    def peak(self, end: _End, inputs: Mapping[int, int]) -> tuple[int, int | None, int | None]:
        """Bytes allocated and reserved at most, and what of them was neither the model's nor its optimizer's."""
        other = min(self.other_bytes, end.allocated_bytes - sum(end.breakdown.values()))
        return self.allocated, self.reserved, max(0, other)


class _CpuWatch:
    """PyTorch's profiler, which records what the CPU allocator does.

    It knows no tensor from before: the end of the storages that are given is noted here, and the end of others ignored.
    It keeps no storage alive.
    """

    def __init__(self, storages: Storages) -> None:
        known = [storage for group in storages.values() for storage in group]
        self.before_bytes = sum(storage.nbytes() for storage in known)
        self.known = {storage.data_ptr() for storage in known}
        self.freed: list[tuple[int, int]] = []
        self.watched = [weakref.ref(storage, partial(_note, self.freed, storage.nbytes())) for storage in known]
        self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profiler.start()
        torch.empty(MARKER_BYTES, dtype=torch.uint8)

    def stop(self) -> None:
        """Ends the recording."""
        self.profiler.stop()
        self.watched.clear()

    def peak(self, end: _End, inputs: Mapping[int, int]) -> tuple[int, int | None, int | None]:
        """The most bytes in use, with what of `inputs` and of the optimizer's state was there before.

        RuntimeError where another profiler took over meanwhile, and PyTorch dropped this one.
        """
        assert self.profiler.profiler is not None
        changes, made = _changes(self.profiler.profiler.kineto_results)
        if not changes or changes[0][1] != MARKER_BYTES:
            raise RuntimeError("another profiler was started within the step: nothing was measured")
        others = {**inputs, **end.states}
        before = [size for address, size in others.items() if address not in self.known | made]
        before_bytes = self.before_bytes + sum(before)
        peak_bytes = before_bytes + max(accumulate(size for _, size in sorted([*changes, *self.freed])))
        return peak_bytes, None, None


def _changes(results: Any) -> tuple[list[tuple[int, int]], set[int]]:
    """What was allocated and freed, as (nanoseconds, bytes) in order, and the addresses of what was allocated.

    By address: the profiler also reports the end of what it takes for a tensor of an earlier profile.
    """
    pending = list(results.experimental_event_tree()) if results is not None else []
    events = []
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == _EventType.Allocation:
            events.append((event.start_time_ns, event.extra_fields.alloc_size, event.extra_fields.ptr))
    sizes: dict[int, int] = {}
    changes, made = [], set()
    for nanoseconds, size, address in sorted(events):
        if size > 0:
            sizes[address] = size
            made.add(address)
            changes.append((nanoseconds, size))
        elif address in sizes:
            changes.append((nanoseconds, -sizes.pop(address)))
    return changes, made


def _note(freed: list[tuple[int, int]], size: int, _: Any) -> None:
    freed.append((time.time_ns(), -size))  # the clock of the profiler's events


def _gradients_at_peak(predicted: Peak) -> float:
    """The share of the step's gradients that the plan has at its peak."""
    at_end = predicted.curve.categories["gradients"][-1] if predicted.curve is not None else 0
    return min(1.0, predicted.breakdown.get("gradients", 0) / at_end) if at_end else 0.0


def _holds(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> bool:
    own = {id(parameter) for parameter in model.parameters()}
    return any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])


def _storages(
    model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], device: torch.device
) -> dict[str, list[torch.UntypedStorage]]:
    """The storages of a model and its optimizers on a device by category, each once."""
    own = {id(parameter) for parameter in model.parameters()}
    states = [state for optimizer in optimizers for parameter, state in optimizer.state.items() if id(parameter) in own]
    groups: dict[str, Iterable[Any]] = {
        "parameters": model.parameters(),
        "buffers": model.buffers(),
        "gradients": (parameter.grad for parameter in model.parameters()),
        "optimizer": _pytree.tree_leaves([dict(state) for state in states]),
    }
    seen: set[int] = set()
    found: Storages = {}
    for name, values in groups.items():
        found[name] = []
        for tensor in _plain_tensors(values):
            storage = tensor.untyped_storage()
            if tensor.device == device and id(storage) not in seen:
                seen.add(id(storage))
                found[name].append(storage)
    return found


def _plain_tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors that hold the memory: those inside of wrappers such as DTensor."""
    for value in values:
        if is_traceable_wrapper_subclass(value):
            names, _ = value.__tensor_flatten__()
            yield from _plain_tensors(getattr(value, name) for name in names)
        elif isinstance(value, torch.Tensor):
            yield value


def _bytes(storages: Iterable[torch.UntypedStorage], device: torch.device) -> int:
    block = ALLOCATOR_BLOCK_BYTES.get(device.type, 1)
    return sum(-(-storage.nbytes() // block) * block for storage in storages)
