"""The forward of a whole model as one graph, but for the calls of some blocks."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils import _pytree

from velora_fx.capture import (
    CONSTANTS,
    CaptureError,
    UnequalError,
    attached_to,
    call_with,
    carriers_of,
    export_function,
    isolated,
    plain_graph_module,
    refusals,
    state_of,
    tensors_inside,
)
from velora_fx.passes import PREPARE, run
from velora_fx.simulate import as_compiled
from velora_fx.simulate.compiled.block_calls import BlockCall, replay

_TENSOR, _CACHE = object(), object()


@dataclass(frozen=True)
class Trace:
    """The graph of a model's forward but for the blocks left out, and its result: the leaves, with _TENSOR where a
    tensor belongs, and their structure.

    The first `num_results` outputs are the tensors of the result, and those in the caches that it holds. A result that
    is a dataclass of the model's own is its fields by name, and `record` one like it to put them into.
    """

    gm: GraphModule
    leaves: Sequence[Any]
    structure: Any
    num_results: int
    record: Any = None

    @property
    def returns_caches(self) -> bool:
        """True if the result holds the key-value caches that the blocks filled."""
        return _CACHE in self.leaves

    def rebuild(self, tensors: list[Any]) -> Any:
        """The model's result from its tensors; caches are None."""
        filled = iter(tensors)
        leaves = [next(filled) if leaf is _TENSOR else None if leaf is _CACHE else leaf for leaf in self.leaves]
        result = _pytree.tree_unflatten(leaves, self.structure)
        return result if self.record is None else _with_fields(self.record, result)


def trace(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    calls: Sequence[BlockCall],
    passed_by: Collection[str] = (),
) -> Trace:
    """Traces a fake model's forward for fake inputs, the calls that have graphs left out.

    What these return are the graph's last inputs. An `autograd.Function` becomes the operations of its forward. Raises
    ValueError for a model that cannot be traced as a whole, or that returns something else than tensors, constants and
    caches. `passed_by` is as in `find_blocks`.
    """
    leaves, spec = _pytree.tree_flatten((args, kwargs))
    state = {**state_of(model), **carriers_of(model)}
    attached = {name: attached_to(tensor) for name, tensor in state.items()}
    tensors = tensors_of((args, kwargs))
    result: dict[str, Any] = {}

    def forward(ts: list[torch.Tensor]) -> list[Any]:
        given = iter(ts[len(state) :])
        filled = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        call_args, call_kwargs = _pytree.tree_unflatten(filled, spec)
        named = dict(zip(state, ts, strict=False))
        for name, tensor in named.items():
            vars(tensor).update(attached[name])
        marks = replay(model, calls, list(given), passed_by)
        with marks as marked, refusals(own_backwards=True), as_compiled():
            output = call_with(model, named, call_args, call_kwargs)
        if dataclasses.is_dataclass(output) and type(output) not in _pytree.SUPPORTED_NODES:
            fields = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
            result["record"], output = _with_fields(output, dict.fromkeys(fields)), fields
        result["leaves"], result["structure"] = _pytree.tree_flatten(output)
        held = [tensor for leaf in result["leaves"] if _is_cache(leaf) for tensor in tensors_inside(leaf)]
        results = [*tensors_of(result["leaves"]), *held]
        result["num_results"] = len(results)
        return [*results, *marked]

    inputs = [*state.values(), *tensors, *(tensor for call in calls for tensor in call.outputs)]
    try:
        with isolated():
            program = export_function(forward, inputs)
    except UnequalError:
        raise
    except Exception as error:
        reason = error if isinstance(error, CaptureError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"compiled=True plans for torch.compile(model), and this model cannot be traced as a whole ({reason}): "
            "use compiled=False"
        ) from error
    kinds = [_kind_of(leaf) for leaf in result["leaves"]]
    gm = run(plain_graph_module(program, list(state)), PREPARE)
    return Trace(gm, kinds, result["structure"], result["num_results"], result.get("record"))


def _with_fields(record: Any, fields: Mapping[str, Any]) -> Any:
    made = copy.copy(record)
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


def _is_cache(leaf: Any) -> bool:
    return hasattr(leaf, "get_seq_length")


def _kind_of(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return _TENSOR
    if _is_cache(leaf):
        return _CACHE
    if isinstance(leaf, CONSTANTS):
        return leaf
    raise ValueError(
        f"a compiled step cannot be planned for a model that returns a {type(leaf).__name__}: return tensors, numbers "
        "and text in tuples, lists, dicts or a dataclass, or use compiled=False"
    )


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors among the leaves of nested containers."""
    return [leaf for leaf in _pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
