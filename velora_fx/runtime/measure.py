"""The real peak of a training step, from the end of one optimizer step to the end of the next."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
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
from velora_fx.runtime.optimizers import leave

Storages = dict[str, list[torch.UntypedStorage]]
MARKER_BYTES = 1


class Measurement:
    """Measures the second step of a model's optimizer and calls `done` with it.

    It hangs on all optimizers while it is pending; those without a parameter of the model are ignored. It holds the
    model and `done`, a bound method, weakly; a copy of it is None. `predicted` tells how many of the gradients are
    there at the peak. `inputs`, where the shapes of a step's inputs are collected, is cleared at its start. On CPU what
    was there before and is neither the model's nor the optimizer's is not counted.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        predicted: Peak,
        device_type: str,
        inputs: dict[str, tuple[int, ...]],
        done: Callable[[Measured], None],
    ) -> None:
        self.model = weakref.ref(model)
        self.predicted = predicted
        self.device_type = device_type
        self.inputs = inputs
        self.done = weakref.WeakMethod(done)
        self.optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self.first: weakref.ref[torch.optim.Optimizer] | None = None
        self.step: _Step | None = None
        self.is_over = False
        self.handle = register_optimizer_step_post_hook(self)
        self.finalizer = weakref.finalize(model, self._drop)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        model = self.model()
        if model is not None and not self.is_over and _holds(optimizer, model):
            self.optimizers.add(optimizer)
            if self.step is None:
                self._begin(model, optimizer)
            elif self.first is not None and self.first() is optimizer:
                self._end(model, optimizer)
        if self.is_over or model is None:
            leave(self.handle)

    def cancel(self) -> None:
        """Ends it without a result and takes it off the optimizers."""
        self.is_over = True
        self.finalizer.detach()
        self._drop()
        self.handle.remove()

    def _begin(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) > 1 or {device.type for device in devices} != {self.device_type}:
            self.is_over = True  # the plan is for one device of another kind
        elif self.device_type != "cpu" or not torch._C._autograd._profiler_enabled():  # there can be but one
            self.step = _Step(_storages(model, self.optimizers, *devices), *devices)
            self.first = weakref.ref(optimizer, self._drop)
            self.inputs.clear()

    def _end(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        assert self.step is not None
        step, self.step = self.step, None
        peaks = step.stop()
        if peaks is None:
            self._begin(model, optimizer)
            return
        self.is_over = True
        found = step.measured(*peaks, _storages(model, self.optimizers, step.device), self.predicted)
        done = self.done()
        if done is not None:
            done(replace(found, inputs=dict(self.inputs)))

    def _drop(self, _: Any = None) -> None:
        """Ends the step in progress: it is not to be measured, or its optimizer is gone."""
        step, self.step = self.step, None
        if step is not None:
            step.stop()


class _Step:
    """A step in progress; `stop` ends it and returns its peaks of allocated and of reserved bytes, None if they got
    lost. It keeps no storage alive."""

    def __init__(self, storages: Storages, device: torch.device) -> None:
        self.device = device
        self.gradients = [weakref.ref(storage) for storage in storages["gradients"]]
        self.known_bytes = sum(_bytes(group, device) for group in storages.values())
        self.stop: Callable[[], tuple[int, int | None] | None]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.other_bytes = torch.cuda.memory_allocated(device) - self.known_bytes
            self.stop = partial(_cuda_peaks, device)
        else:
            self.other_bytes = 0
            self.stop = watch_cpu([storage for group in storages.values() for storage in group])

    def measured(self, allocated: int, reserved: int | None, storages: Storages, predicted: Peak) -> Measured:
        """The result, with what is there at the end of the step."""
        breakdown = {name: _bytes(group, self.device) for name, group in storages.items()}
        end_bytes = sum(breakdown.values())
        kept = {id(ref()) for ref in self.gradients} - {id(None)}
        kept_bytes = _bytes([storage for storage in storages["gradients"] if id(storage) in kept], self.device)
        breakdown["gradients"] = kept_bytes + int(_gradients_at_peak(predicted) * (breakdown["gradients"] - kept_bytes))
        if self.device.type == "cuda":
            left = min(self.other_bytes, torch.cuda.memory_allocated(self.device) - end_bytes)
            breakdown["other"] = max(0, left)
        breakdown["activations and temporary"] = max(0, allocated - sum(breakdown.values()))
        return Measured(allocated, reserved, breakdown)


def _cuda_peaks(device: torch.device) -> tuple[int, int | None]:
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


def watch_cpu(storages: Sequence[torch.UntypedStorage]) -> Callable[[], tuple[int, int | None] | None]:
    """Has the profiler record what the CPU allocator does; the function that it returns ends that, and gives the most
    bytes in use, these storages included.

    The profiler knows no tensor from before: the end of these storages is noted here, and the end of others ignored.
    """
    before = sum(storage.nbytes() for storage in storages)
    freed: list[tuple[int, int]] = []
    watched = [weakref.ref(storage, partial(_note, freed, storage.nbytes())) for storage in storages]
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    profiler.start()
    torch.empty(MARKER_BYTES, dtype=torch.uint8)

    def stop() -> tuple[int, int | None] | None:
        profiler.stop()
        watched.clear()
        assert profiler.profiler is not None
        changes = _changes(profiler.profiler.kineto_results)
        if not changes or changes[0][1] != MARKER_BYTES:
            return None  # another profiler was started meanwhile, and PyTorch dropped this one
        return before + max(accumulate(size for _, size in sorted([*changes, *freed]))), None

    return stop


def _changes(results: Any) -> list[tuple[int, int]]:
    """What was allocated and freed, as (nanoseconds, bytes) in order.

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
    changes = []
    for nanoseconds, size, address in sorted(events):
        if size > 0:
            sizes[address] = size
            changes.append((nanoseconds, size))
        elif address in sizes:
            changes.append((nanoseconds, -sizes.pop(address)))
    return changes


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
    model: torch.nn.Module, optimizers: Iterable[torch.optim.Optimizer], device: torch.device
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
