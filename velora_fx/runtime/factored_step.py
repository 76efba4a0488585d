"""What happens around an optimizer's step of a model with factored gradients."""

from __future__ import annotations

import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch.optim import optimizer as torch_optimizer
from torch.utils.hooks import RemovableHandle

from velora_fx.capture import own_carriers
from velora_fx.ops import fold
from velora_fx.passes.swap import CARRIER, Choice
from velora_fx.runtime.exactness import check_exactness, kept_share, settings_of
from velora_fx.runtime.region import Region
from velora_fx.runtime.shards import Shard, local_shard


@dataclass(frozen=True)
class FactoredWeight:
    """A weight with a factored gradient, its carrier and its projection v [G, M]."""

    name: str
    weight: torch.nn.Parameter
    carrier: torch.nn.Parameter
    v: torch.Tensor
    input_dim: int

    @property
    def scale(self) -> float:
        """|v|, the same for all of its entries: 1 / √M."""
        return float(self.v.shape[1] ** -0.5)


Held = tuple[FactoredWeight, Mapping[str, Any]]  # with the group of parameters that its carrier is in


@dataclass
class Step:
    """A step in progress: what the optimizer holds, what of it has a gradient and the share of the weight that decay
    leaves, and the scaled gradients with their versions. `frame` is that of the call."""

    frame: FrameType | None
    held: list[Held]
    stepped: list[tuple[FactoredWeight, Any]]
    scaled: list[tuple[torch.Tensor, int, float]]


class Folding:
    """Has every optimizer that holds carriers of its regions step their weights.

    Before a step it multiplies the carriers' gradients by |v|, so that the optimizer sees the magnitudes of the dense
    gradient; after it, what the carriers have become is spread over the weights (`fold`), decayed as the optimizer
    would have, and the carriers are zero again. The regions hold it, and it hangs on all optimizers while there are any
    or while carriers that were taken out are still held. An optimizer that holds such a carrier, or a weight but not
    its carrier, or that is not exact with carriers, is refused with RuntimeError before it changes anything. A step
    that `GradScaler` skips changes nothing.
    """

    def __init__(self) -> None:
        self.regions: weakref.WeakSet[Region] = weakref.WeakSet()
        self.retired: weakref.WeakValueDictionary[int, torch.nn.Parameter] = weakref.WeakValueDictionary()
        self.checked: set[tuple[Any, ...]] = set()
        self.steps: dict[int, Step] = {}
        self.handles: tuple[RemovableHandle, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return Folding, ()  # copies of regions add themselves

    def add(self, region: Region) -> None:
        """Takes up a region whose carriers are in place."""
        self.regions.add(region)
        self._hold()

    def _hold(self) -> None:
        if not self.handles:
            before = _Hook(self.before, torch_optimizer.register_optimizer_step_pre_hook)
            after = _Hook(self.after, torch_optimizer.register_optimizer_step_post_hook)
            self.handles = before.handle, after.handle

    def discard(self, region: Region) -> None:
        """Lets a region go, and goes off the optimizers with the last one."""
        self.regions.discard(region)
        if not self.is_needed:
            for handle in self.handles:
                handle.remove()
            self.handles = ()

    @property
    def is_needed(self) -> bool:
        """True while a model or an optimizer may hold carriers."""
        return bool(self.regions or self.retired)

    def retire(self, carriers: Iterable[torch.nn.Parameter]) -> None:
        """Remembers carriers that were taken out of the model, as long as someone holds them."""
        for carrier in carriers:
            self.retired[id(carrier)] = carrier
            carrier._velora_folding = self  # type: ignore[attr-defined]  # lives as long as they do
        self._hold()

    def weights(self) -> Iterator[FactoredWeight]:
        """The live weights with carriers; modules may have got other parameters meanwhile (FSDP2)."""
        for region in sorted(self.regions, key=lambda region: region.name):
            for choice in region.choices.values():
                found = _weight_of(region, choice)
                if found is not None:
                    yield found

    def before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Refuses what would not be exact, and scales the gradients: after the closure, where there is one."""
        last = self.steps.pop(id(optimizer), None)
        if last is not None and _is_running(last.frame):  # a step that calls that of its base class
            self.steps[id(optimizer)] = last
            return None
        if last is not None:
            _unscale(last)  # it failed
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        found = list(self.weights())
        held: list[Held] = [(item, groups[id(item.carrier)]) for item in found if id(item.carrier) in groups]
        self._check(optimizer, groups, found, held)
        if not held:
            return None
        step = self.steps[id(optimizer)] = Step(_caller(), held, [], [])
        torch._foreach_zero_([item.carrier for item, _ in held])  # after `to_empty` they hold anything
        is_positional = len(args) > 1  # behind the optimizer itself
        closure = args[1] if is_positional else kwargs.get("closure")
        if closure is None:
            _scale(step)
            return None
        scaled = partial(_scaled_after, closure, step)
        return ((args[0], scaled, *args[2:]), kwargs) if is_positional else (args, {**kwargs, "closure": scaled})

    def after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Folds what was stepped."""
        step = self.steps.get(id(optimizer))
        if step is None or _caller() is not step.frame:
            return
        del self.steps[id(optimizer)]
        together: dict[tuple[Any, ...], tuple[Any, list[Shard]]] = {}
        for item, keep in step.stepped:
            shard = local_shard(item.weight, item.carrier, item.v, item.input_dim)
            key = (keep if isinstance(keep, float) else id(keep), shard.weight.device)
            together.setdefault(key, (keep, []))[1].append(shard)
        skipped = getattr(optimizer, "found_inf", None)
        for share, shards in together.values():
            keep = torch.as_tensor(share, dtype=torch.float64)
            if skipped is not None:  # the step itself looks at it, so that nothing has to wait for the device
                keep = keep if keep.device == skipped.device else torch.full_like(skipped, float(keep))
                keep = torch.where(skipped.bool(), torch.ones_like(keep), keep)
            fold([s.weight for s in shards], [s.carrier for s in shards], [s.v for s in shards], keep)
        _unscale(step)

    def _check(
        self,
        optimizer: torch.optim.Optimizer,
        groups: Mapping[int, Any],
        found: Sequence[FactoredWeight],
        held: Sequence[Held],
    ) -> None:
        name = type(optimizer).__name__
        for item in found:
            self.retired.pop(id(item.carrier), None)  # put back, after an optimize that failed
        if any(number in groups for number in self.retired):
            raise RuntimeError(
                f"velora_fx: {name} holds carriers that restore or another optimize has taken out of the model: make "
                "the optimizer anew"
            )
        for item in found:
            if id(item.weight) in groups and id(item.carrier) not in groups:
                raise RuntimeError(
                    f"velora_fx: {name} holds {item.name} but not {item.name}_carrier, which has its gradient: make "
                    "the optimizer from model.parameters() after velora_fx.optimize, not before"
                )
        weights: set[int] = set()
        for item, group in held:
            if item.weight.grad is not None:
                raise RuntimeError(
                    f"velora_fx: {item.name} has a gradient of its own besides {item.name}_carrier: call "
                    "requires_grad_(False) on it, set its .grad to None, and keep the weight out of the loss"
                )
            if id(item.weight) in weights:
                raise RuntimeError(
                    f"velora_fx: {item.name} was tied to another weight after velora_fx.optimize: tie weights before"
                )
            weights.add(id(item.weight))
            settings = (type(optimizer), *settings_of(group))
            if settings not in self.checked:
                check_exactness(optimizer, group)
                self.checked.add(settings)


class _Hook:
    """Lets optimizers call a method of a Folding without keeping it, and its model, alive."""

    def __init__(self, method: Callable[..., Any], register: Callable[[Any], RemovableHandle]) -> None:
        self.method = weakref.WeakMethod(method)
        self.handle = register(self)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        method: Any = self.method()
        if method is None or not method.__self__.is_needed:
            return self.leave()
        with torch.no_grad():
            return method(optimizer, args, kwargs)

    def leave(self) -> None:
        """Goes off the optimizers once it is the last: PyTorch goes through the hooks themselves, not a copy."""
        hooks = self.handle.hooks_dict_ref()
        if hooks is not None and next(reversed(hooks), None) == self.handle.id:
            self.handle.remove()


def _weight_of(region: Region, choice: Choice) -> FactoredWeight | None:
    """The weight of a choice with its carrier; None where it has none, also because its module was replaced."""
    if choice.carrier is None:
        return None
    owner, _, weight = choice.carrier.parameter.rpartition(".")
    module = region.block.get_submodule(owner)
    carrier = own_carriers(module).get(weight + CARRIER)
    if carrier is None:
        return None
    name = f"{region.name}.{choice.carrier.parameter}".lstrip(".")
    v = dict(zip(region.projections, region.placed_on(carrier.device), strict=True))[choice.tensor]
    return FactoredWeight(name, module.get_parameter(weight), carrier, v, choice.carrier.input_dim)


def _frames() -> Iterator[FrameType]:
    """The frames that run now, from the innermost out."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_running(frame: FrameType | None) -> bool:
    return any(running is frame for running in _frames())


def _caller() -> FrameType | None:
    """The frame in which PyTorch calls the hooks of a step."""
    return next((frame for frame in _frames() if frame.f_code.co_filename == torch_optimizer.__file__), None)


def _scaled_after(closure: Callable[[], Any], step: Step) -> Any:
    loss = closure()
    with torch.no_grad():
        _scale(step)
    return loss


def _scale(step: Step) -> None:
    """Multiplies the gradients by |v|, and notes what is stepped and how it decays: hooks may change that meanwhile."""
    step.stepped = [(item, kept_share(group)) for item, group in step.held if item.carrier.grad is not None]
    scales = [(item.carrier.grad, item.scale) for item, _ in step.stepped if item.carrier.grad is not None]
    _multiply(scales)
    step.scaled = [(gradient, gradient._version, scale) for gradient, scale in scales]


def _unscale(step: Step) -> None:
    """Divides those gradients again that are still what they were multiplied to."""
    _multiply([(gradient, 1 / scale) for gradient, version, scale in step.scaled if gradient._version == version])


def _multiply(scaled: Iterable[tuple[torch.Tensor, float]]) -> None:
    together: dict[tuple[Any, ...], list[torch.Tensor]] = defaultdict(list)
    for gradient, scale in scaled:
        together[scale, type(gradient)].append(gradient)
    for (scale, _), gradients in together.items():
        torch._foreach_mul_(gradients, scale)
