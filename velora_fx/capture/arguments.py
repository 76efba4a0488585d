"""Call arguments as a structure and its leaves, in plain Python so that Dynamo can trace it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch

LEAF = "*"
CONSTANTS = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


def flatten(value: Any) -> tuple[Any, list[Any]]:
    """Takes nested tuples, lists and dicts apart: a comparable structure, and the leaves in order."""
    leaves: list[Any] = []
    return _structure(value, leaves), leaves


def _structure(value: Any, leaves: list[Any]) -> Any:
    """The structure of a value, whose leaves are added to the list."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind.__name__, tuple([_structure(item, leaves) for item in value])
    if kind is dict:
        return "dict", tuple(value.keys()), tuple([_structure(item, leaves) for item in value.values()])
    leaves.append(value)
    return LEAF


def unflatten(structure: Any, leaves: list[Any]) -> Any:
    """Puts together what `flatten` took apart."""
    return _rebuild(structure, iter(leaves))


def _rebuild(structure: Any, leaves: Iterator[Any]) -> Any:
    if structure == LEAF:
        return next(leaves)
    if structure[0] == "dict":
        return {key: _rebuild(part, leaves) for key, part in zip(structure[1], structure[2], strict=True)}
    items = [_rebuild(part, leaves) for part in structure[1]]
    return items if structure[0] == "list" else tuple(items)


def without_empty_caches(
    args: tuple[Any, ...], kwargs: dict[str, Any], layer: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Passes None for every key-value cache that holds nothing yet for this layer: it would be written, never read.

    All layers of a model share one cache object, each with a slot of its own.
    """
    return (
        tuple([None if _is_empty_cache(value, layer) else value for value in args]),
        {name: None if _is_empty_cache(value, layer) else value for name, value in kwargs.items()},
    )


def is_cache(value: Any) -> bool:
    """True for a key-value cache."""
    if value is None or isinstance(value, torch.Tensor):
        return False
    return hasattr(value, "get_seq_length") and hasattr(value, "update")


def _is_empty_cache(value: Any, layer: int) -> bool:
    return is_cache(value) and int(value.get_seq_length(layer)) == 0


def parameter_names(module: torch.nn.Module) -> tuple[str, ...]:
    """The names of the arguments that a forward takes by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)


def named_tensors(
    names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[tuple[str, torch.Tensor]]:
    """The tensors of a call, also those in nested tuples, lists and dicts; `names` are those of positional arguments.

    Arguments beyond them are called "argument 2" and so on, what is in a container "batch.0" or "batch.pixels".
    """
    named = [(names[index] if index < len(names) else f"argument {index}", value) for index, value in enumerate(args)]
    return [found for name, value in (*named, *kwargs.items()) for found in _tensors_in(name, value)]


def _tensors_in(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (dict, tuple, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors_in(f"{name}.{key}", item)


def example_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Reads example inputs as `(args, kwargs)`: a mapping, a tuple or list, one tensor, or such a pair itself.

    Of a list of mappings, several batches, the one with most entries is taken. Raises ValueError for anything else.
    """
    if isinstance(example_inputs, list) and example_inputs and all(hasattr(each, "keys") for each in example_inputs):
        return max(
            map(example_call, example_inputs), key=lambda call: sum(t.numel() for _, t in named_tensors((), *call))
        )
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if hasattr(example_inputs, "keys"):
        return (), {name: example_inputs[name] for name in example_inputs.keys()}  # noqa: SIM118 (BatchEncoding)
    if isinstance(example_inputs, (tuple, list)):
        pair = len(example_inputs) == 2 and isinstance(example_inputs[0], (tuple, list))
        if pair and hasattr(example_inputs[1], "keys"):
            return tuple(example_inputs[0]), dict(example_inputs[1])
        return tuple(example_inputs), {}
    raise ValueError(
        f"example_inputs must be a dict of keyword arguments, a tuple of arguments or an (args, kwargs) pair, "
        f"got {type(example_inputs).__name__}"
    )


def tensors_inside(value: Any) -> Iterator[torch.Tensor]:
    """The floating tensors in an object, its attributes and their items."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and value.numel():
            yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_inside(item)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        for attribute in vars(value).values():
            yield from tensors_inside(attribute)
