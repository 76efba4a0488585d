"""What a forward reads of its module's attributes, and what it leaves behind in them."""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from velora_fx.capture.arguments import CONSTANTS

# What every module has, none of which a forward may depend on but `training`, which is a part of a graph's key.
INTERNAL_ATTRIBUTES = frozenset({*vars(torch.nn.Module()), "forward", "_compiled_call_impl"})
HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class made by Python code, which can be changed for a while


@contextlib.contextmanager
def own_forward(module: torch.nn.Module, forward: Callable[..., Any] | None) -> Iterator[list[str]]:
    """Gives a module `forward`, or that of its class, in the place of a stand-in, and puts everything back.

    The list that it yields holds at the end the dotted names of the attributes that were set or changed meanwhile.
    """
    stand_in = vars(module).pop("forward", None)
    if forward is not None:
        module.forward = forward
    before = {name: (child, dict(vars(child))) for name, child in module.named_modules()}
    changed: list[str] = []
    with contextlib.ExitStack() as stack:
        inside = {
            f"{name}.{key}".lstrip("."): stack.enter_context(changes_in(value))
            for name, (_, attributes) in before.items()
            for key, value in attributes.items()
        }
        try:
            yield changed
        finally:
            for name, (child, attributes) in before.items():
                changed += [f"{name}.{key}".lstrip(".") for key in _changed_keys(vars(child), attributes)]
                vars(child).clear()
                vars(child).update(attributes)
            stack.close()
            changed += [name for name, found in inside.items() if found]
            vars(module).pop("forward", None)
            if stand_in is not None:
                module.forward = stand_in


@contextlib.contextmanager
def changes_in(value: Any) -> Iterator[list[Any]]:
    """Puts the containers and plain objects inside a value back; the list that it yields holds those that changed."""
    before = [(container, copy.copy(container)) for container in _containers(value)]
    changed: list[Any] = []
    try:
        yield changed
    finally:
        for container, old in before:
            if _changed_keys(_items(container), _items(old)):
                changed.append(container)
                container.clear()
                container.extend(old) if isinstance(old, list) else container.update(old)


def holds_tensor(value: Any) -> bool:
    """True for a tensor and for containers and plain objects with one inside."""
    return isinstance(value, torch.Tensor) or any(
        isinstance(item, torch.Tensor) for container in _containers(value) for item in _items(container).values()
    )


def _containers(value: Any) -> Iterator[Any]:
    """The lists, dicts and sets inside a value, among them the attributes of a plain object, but not of its objects."""
    seen: set[int] = set()
    pending = [vars(value) if is_plain_object(value) else value]
    while pending:
        container = pending.pop()
        if isinstance(container, (list, dict, set, tuple)) and id(container) not in seen:
            seen.add(id(container))
            pending += container.values() if isinstance(container, dict) else container
            if not isinstance(container, tuple):
                yield container


def is_plain_object(value: Any) -> bool:
    """True for an object with attributes that is no tensor, module, class, function or container."""
    others = (torch.Tensor, torch.nn.Module, type, types.ModuleType, list, dict, set, tuple)
    return hasattr(value, "__dict__") and not isinstance(value, others) and not callable(value)


def _items(container: Any) -> dict[Any, Any]:
    if isinstance(container, dict):
        return container
    return dict(enumerate(container)) if isinstance(container, list) else dict.fromkeys(container)


def _changed_keys(new: dict[Any, Any], old: dict[Any, Any]) -> list[Any]:
    """The keys that were added, removed, or given another value."""
    return [key for key in {**old, **new} if key not in old or key not in new or _is_new(old[key], new[key])]


def _is_new(old: Any, new: Any) -> bool:
    return new is not old and not (isinstance(new, (*CONSTANTS, tuple)) and type(new) is type(old) and new == old)


@contextlib.contextmanager
def recorded_reads(module: torch.nn.Module) -> Iterator[set[tuple[str, ...]]]:
    """Collects which attributes (no parameters, no submodules) of the module tree are read meanwhile.

    They are listed as (module name, attribute), and those of a plain object (a configuration) that is an attribute
    itself as (module name, attribute, field).
    """
    reads: set[tuple[str, ...]] = set()
    owners: dict[int, tuple[str, ...]] = {id(child): (name,) for name, child in module.named_modules()}
    classes = {type(child) for child in module.modules()}
    attributes = [(name, *item) for name, child in module.named_modules() for item in vars(child).items()]
    for name, attribute, value in attributes:
        if not is_plain_object(value):
            continue
        owners.setdefault(id(value), (name, attribute))
        if type(value).__flags__ & HEAP_TYPE:
            classes.add(type(value))
        else:
            reads.update((name, attribute, field) for field in vars(value))
    with contextlib.ExitStack() as stack:
        for class_ in classes:
            stack.enter_context(_recording(class_, owners, reads))
        yield reads


@contextlib.contextmanager
def _recording(class_: type, owners: dict[int, tuple[str, ...]], reads: set[tuple[str, ...]]) -> Iterator[None]:
    own = vars(class_).get("__getattribute__")
    original: Any = class_.__getattribute__

    def __getattribute__(self: Any, attribute: str) -> Any:
        owner = owners.get(id(self))
        if (
            owner is not None
            and attribute not in INTERNAL_ATTRIBUTES
            and (attribute in object.__getattribute__(self, "__dict__") or _is_class_constant(type(self), attribute))
        ):
            reads.add((*owner, attribute))
        return original(self, attribute)

    class_.__getattribute__ = __getattribute__  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        if own is not None:
            class_.__getattribute__ = own  # type: ignore[method-assign]
        else:
            del class_.__getattribute__


def _is_class_constant(class_: type, attribute: str) -> bool:
    found = [vars(base)[attribute] for base in class_.__mro__ if attribute in vars(base)]
    return bool(found) and isinstance(found[0], (*CONSTANTS, tuple, list, dict))
