"""What happens around an optimizer's step of a model with factored gradients."""

from __future__ import annotations

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from velora_fx.exactness import check_exactness, kept_share
from velora_fx.fold import fold
from velora_fx.local_shards import Shard, local_shard
from velora_fx.module_state import carriers_of
from velora_fx.optimizer_hooks import leave
from velora_fx.region import Region


@dataclass(frozen=True)
class Factored:
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


Held = tuple[Factored, Mapping[str, Any]]  # with the group of parameters that its carrier is in
VARYING = ("params", "lr", "initial_lr")


class Folding:
    """Has every optimizer that holds carriers of the regions step their weights.

    Before a step it multiplies the carriers' gradients by |v|, so that the optimizer sees the magnitudes of the dense
    gradient; after it, what the carriers have become is spread over the weights (`fold`), decayed as the optimizer
    would have, and the carriers are zero again. It hangs on all optimizers as long as it lives; one that holds
    a weight but not its carrier, or that is not exact with carriers, is refused with RuntimeError before it changes
    anything. A step that `GradScaler` skips changes nothing.
    """

    def __init__(self, regions: Sequence[Region]) -> None:
        self.regions = list(regions)
        self.checked: set[tuple[Any, ...]] = set()
        self.hold()

    def hold(self) -> None:
        """Hangs it on the optimizers."""
        self.stepping: dict[int, list[Held]] = {}
        before, after = _Before(weakref.ref(self)), _After(weakref.ref(self))
        before.handle = register_optimizer_step_pre_hook(before)
        after.handle = register_optimizer_step_post_hook(after)
        self.handles = before.handle, after.handle

    def release(self) -> None:
        """Takes it off the optimizers."""
        for handle in self.handles:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {"regions": self.regions, "checked": set()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.hold()

    def factored(self) -> Iterator[Factored]:
        """The live weights with carriers; modules may have got other parameters meanwhile (FSDP2)."""
        for region in self.regions:
            if region.removed:
                continue
            carriers = carriers_of(region.block)
            placed = dict(zip(region.placed, region.placed_on(next(iter(carriers.values())).device), strict=True))
            for choice in region.choices.values():
                if choice.carrier:
                    weight = region.block.get_parameter(choice.carrier.parameter)
                    name = f"{region.name}.{choice.carrier.parameter}".lstrip(".")
                    carrier = carriers[choice.carrier.name]
                    yield Factored(name, weight, carrier, placed[choice.tensor], choice.carrier.input_dim)

    def before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Refuses what would not be exact, and scales the gradients: after the closure, where there is one."""
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        held: list[Held] = [(item, groups[id(item.carrier)]) for item in self.factored() if id(item.carrier) in groups]
        self._check(optimizer, groups, held)
        if not held:
            return None
        self.stepping[id(optimizer)] = held
        torch._foreach_zero_([item.carrier for item, _ in held])  # after `to_empty` they hold anything
        is_positional = len(args) > 1  # behind the optimizer itself
        closure = args[1] if is_positional else kwargs.get("closure")
        if closure is None:
            _scale(held, inverse=False)
            return None
        scaled = partial(_scaled_after, closure, held)
        return ((args[0], scaled, *args[2:]), kwargs) if is_positional else (args, {**kwargs, "closure": scaled})

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """Folds what was stepped."""
        held = self.stepping.pop(id(optimizer), [])
        together: dict[tuple[Any, ...], list[Shard]] = defaultdict(list)
        keeps: dict[tuple[Any, ...], Any] = {}
        for item, group in held:
            if item.carrier.grad is not None:
                shard = local_shard(item.weight, item.carrier, item.v, item.input_dim)
                key = (id(group), shard.weight.device)
                together[key].append(shard)
                keeps[key] = kept_share(group)
        skipped = getattr(optimizer, "found_inf", None)
        for key, shards in together.items():
            keep = torch.as_tensor(keeps[key], dtype=torch.float64)
            if skipped is not None:  # the step itself looks at it, so that nothing has to wait for the device
                keep = torch.where(skipped.bool(), 1.0, keep.to(skipped.device))
            fold([s.weight for s in shards], [s.carrier for s in shards], [s.v for s in shards], keep)
        _scale(held, inverse=True)

    def _check(
        self,
        optimizer: torch.optim.Optimizer,
        groups: Mapping[int, Any],
        held: Sequence[Held],
    ) -> None:
        for item in self.factored():
            if id(item.weight) in groups and id(item.carrier) not in groups:
                raise RuntimeError(
                    f"velora_fx: {type(optimizer).__name__} holds {item.name} but not {item.name}_carrier, which has "
                    "its gradient: make the optimizer from model.parameters() after velora_fx.optimize, not before"
                )
        for item, group in held:
            if item.weight.grad is not None:
                raise RuntimeError(
                    f"velora_fx: {item.name} has a gradient of its own besides {item.name}_carrier: leave its "
                    "requires_grad at False, and keep the weight itself out of the loss"
                )
            settings = tuple((name, repr(value)) for name, value in group.items() if name not in VARYING)
            if (type(optimizer), settings) not in self.checked:
                check_exactness(optimizer, group)
                self.checked.add((type(optimizer), settings))


@contextlib.contextmanager
def holding(regions: Sequence[Region]) -> Iterator[None]:
    """The context in which optimizers step the weights of these regions."""
    folding = Folding(regions) if any(region.carriers for region in regions) else None
    try:
        yield
    finally:
        if folding is not None:
            folding.release()


class _Before:
    """Lets optimizers call a Folding without keeping it, and its model, alive."""

    def __init__(self, folding: Callable[[], Folding | None]) -> None:
        self.folding = folding
        self.handle: RemovableHandle | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        folding = self.folding()
        if folding is None:
            leave(self.handle)
            return None
        with torch.no_grad():
            return folding.before(optimizer, args, kwargs)


class _After(_Before):
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        folding = self.folding()
        if folding is None:
            leave(self.handle)
            return
        with torch.no_grad():
            folding.after(optimizer)


def _scaled_after(closure: Callable[[], Any], held: Sequence[Held]) -> Any:
    loss = closure()
    with torch.no_grad():
        _scale(held, inverse=False)
    return loss


def _scale(held: Sequence[Held], inverse: bool) -> None:
    gradients: dict[float, list[torch.Tensor]] = defaultdict(list)
    for item, _ in held:
        if item.carrier.grad is not None:
            gradients[1 / item.scale if inverse else item.scale].append(item.carrier.grad)
    for scale, tensors in gradients.items():
        torch._foreach_mul_(tensors, scale)
