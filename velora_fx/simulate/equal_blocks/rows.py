"""Rows of equal blocks, of which a few stand for all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from velora_fx.capture import INTERNAL_ATTRIBUTES, attached_tensors, find_blocks, is_plain_object

SHOWN = 4  # of a row: the first, two in the middle, between which all the others would be, and the last
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
CONTAINERS = (list, tuple, set, frozenset, dict)


def find_rows(model: torch.nn.Module, passed_by: Collection[str] = ()) -> tuple[tuple[str, ...], ...]:
    """The dotted names of equal blocks that follow one another, more than SHOWN in each row.

    Equal blocks are made of modules of the same classes with attributes of the same values (the number of the block
    apart) and with tensors of the same shapes, none of which is found anywhere else. `passed_by` is as in
    `find_blocks`.
    """
    blocks = {name: block for name, block in find_blocks(model, passed_by).items() if block is not model}
    owners = Counter(id(tensor) for module in model.modules() for tensor in _own_tensors(module))
    rows: list[list[str]] = []
    for name, block in blocks.items():
        parent = name.rpartition(".")[0]
        is_alone = any(owners[id(tensor)] > 1 for child in block.modules() for tensor in _own_tensors(child))
        if (
            rows
            and not is_alone
            and rows[-1][-1].rpartition(".")[0] == parent
            and are_equal(blocks[rows[-1][0]], block, _number(rows[-1][0]), _number(name))
        ):
            rows[-1].append(name)
        else:
            rows.append([name])
    return tuple(tuple(row) for row in rows if len(row) > SHOWN)


def are_equal(one: torch.nn.Module, other: torch.nn.Module, number: int | None, other_number: int | None) -> bool:
    """True for blocks of these numbers that differ in nothing but those and the values of their tensors."""
    modules, others = list(one.named_modules()), list(other.named_modules())
    if len(modules) != len(others):
        return False
    numbers = number, other_number
    for (name, module), (other_name, other_module) in zip(modules, others, strict=True):
        is_same = (
            name == other_name
            and type(module) is type(other_module)
            and module.training == other_module.training
            and not any(vars(m).get(hooks) for m in (module, other_module) for hooks in HOOKS)
            and "forward" not in {**vars(module), **vars(other_module)}
            and _are_equal_tensors(module, other_module)
            and _are_equal_values(_attributes(module), _attributes(other_module), numbers, set())
        )
        if not is_same:
            return False
    return True


def _number(name: str) -> int | None:
    last = name.rpartition(".")[2]
    return int(last) if last.isdecimal() else None


def _own_tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


def _attributes(module: torch.nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in INTERNAL_ATTRIBUTES}


def _are_equal_tensors(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(
        list(mine) == list(others)
        and all(_described(t) == _described(u) for t, u in zip(mine.values(), others.values(), strict=True))
        for mine, others in ((one._parameters, other._parameters), (one._buffers, other._buffers))
    )


def _described(tensor: torch.Tensor | None) -> Any:
    if tensor is None:
        return None
    own = [id(attached) for attached in attached_tensors(tensor)]  # no two have the same
    return type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad, own


def _are_equal_values(one: Any, other: Any, numbers: tuple[int | None, int | None], seen: set[int]) -> bool:
    """True for values that are the same, that are equal, or that are the numbers of their blocks."""
    if one is other or id(one) in seen:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, CONTAINERS):
        seen.add(id(one))
        if len(one) != len(other):
            return False
        if isinstance(one, Mapping):
            return list(one) == list(other) and _are_equal_values([*one.values()], [*other.values()], numbers, seen)
        if isinstance(one, Sequence):
            return all(_are_equal_values(a, b, numbers, seen) for a, b in zip(one, other, strict=True))
        return bool(one == other)
    if isinstance(one, (bool, float, str, torch.dtype, torch.device, type(None))):
        return bool(one == other)
    if isinstance(one, int):
        return one == other or (one, other) == numbers
    if is_plain_object(one):
        seen.add(id(one))
        return _are_equal_values(vars(one), vars(other), numbers, seen)
    return False
