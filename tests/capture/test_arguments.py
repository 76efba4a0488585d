"""Call arguments come apart into a structure and leaves and go together again; empty caches become None."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.tokenization_utils_base import BatchEncoding

from tests.helpers.examples import for_any
from velora_fx.capture import example_call, flatten, tensors_inside, without_empty_caches
from velora_fx.capture.arguments import unflatten

Pair = namedtuple("Pair", "first second")
keys = st.text(max_size=3) | st.integers(0, 5)
leaves = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.just("*")
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


def leaves_in_order(value: Any) -> list[Any]:
    if type(value) is dict:
        return [leaf for item in value.values() for leaf in leaves_in_order(item)]
    if type(value) in (list, tuple):
        return [leaf for item in value for leaf in leaves_in_order(item)]
    return [value]


def shape_of(value: Any) -> Any:
    """The value with every leaf the same."""
    if type(value) is dict:
        return {key: shape_of(item) for key, item in value.items()}
    return type(value)(map(shape_of, value)) if type(value) in (list, tuple) else 0


@for_any(values)
def test_what_is_taken_apart_goes_together_again(value):
    again = unflatten(*flatten(value))
    assert again == value and repr(again) == repr(value)


@for_any(values)
def test_leaves_come_in_order(value):
    assert flatten(value)[1] == leaves_in_order(value)


@for_any(values, values)
def test_structures_are_equal_exactly_where_only_leaves_differ(one, other):
    def ordered(value: Any) -> str:
        return repr(shape_of(value))  # the order of a dict's keys is part of it

    assert (flatten(one)[0] == flatten(other)[0]) == (ordered(one) == ordered(other))


@for_any(values)
def test_a_structure_can_be_a_key(value):
    assert {flatten(value)[0]: True}[flatten(value)[0]]


@pytest.mark.parametrize(
    "value", [Pair(1, 2), OrderedDict(a=1), torch.zeros(2, 2), torch.Size([1, 2]), {1, 2}, range(3)], ids=repr
)
def test_other_containers_are_leaves(value):
    structure, found = flatten((value,))
    assert found[0] is value and unflatten(structure, found)[0] is value


def test_dynamo_traces_both_ways():
    def doubled(value: Any) -> Any:
        structure, found = flatten(value)
        return unflatten(structure, [2 * leaf for leaf in found])

    torch._dynamo.reset()
    x = torch.ones(2)
    result = torch.compile(doubled, backend="eager", fullgraph=True)({"a": (x, [x + 1])})
    assert torch.equal(result["a"][0], x * 2) and torch.equal(result["a"][1][0], x * 4)


def filled(*layers: int) -> DynamicCache:
    cache = DynamicCache()
    for layer in layers:
        cache.update(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), layer)
    return cache


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_cache_is_passed_as_none_while_the_slot_of_the_layer_is_empty(layer):
    """All layers share one cache; those before this one have filled theirs in this very forward."""
    empty, cache = filled(*range(layer)), filled(*range(layer + 1))
    args, kwargs = without_empty_caches((empty, 1), {"past_key_values": empty, "use_cache": True}, layer)
    assert args == (None, 1) and kwargs == {"past_key_values": None, "use_cache": True}
    args, kwargs = without_empty_caches((cache,), {"past_key_values": cache}, layer)
    assert args[0] is cache and kwargs["past_key_values"] is cache


def test_everything_else_stays_the_same_object():
    values_ = (torch.zeros(2), {"a": 1}, [None], "text", 3)
    args, kwargs = without_empty_caches(values_, dict(zip("abcde", values_, strict=True)), 0)
    assert all(one is other for one, other in zip(args, values_, strict=True))
    assert all(one is other for one, other in zip(kwargs.values(), values_, strict=True))


X, MASK = torch.zeros(2, 3), torch.ones(2, 3)
STATE = {"a": X}
CALLS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "one tensor": (X, (X,), {}),
    "a tuple of arguments": ((X, MASK), (X, MASK), {}),
    "a list of arguments": ([X], (X,), {}),
    "keyword arguments": ({"x": X, "mask": MASK}, (), {"x": X, "mask": MASK}),
    "what a tokenizer returns": (BatchEncoding({"x": X}), (), {"x": X}),
    "a pair": (((X,), {"mask": MASK}), (X,), {"mask": MASK}),
    "a pair of a list": ([[X], {"mask": MASK}], (X,), {"mask": MASK}),
    "a pair without arguments": (((), {"x": X}), (), {"x": X}),
    "a pair with a tokenizer's result": (((), BatchEncoding({"x": X})), (), {"x": X}),
    "two tensors and a dict": ((X, MASK, STATE), (X, MASK, STATE), {}),
    "a tensor and a dict": ((X, STATE), (X, STATE), {}),
    "no arguments": ((), (), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_example_inputs_are_read_as(name):
    given_, expected_args, expected_kwargs = CALLS[name]
    args, kwargs = example_call(given_)
    assert (type(args), type(kwargs)) == (tuple, dict)
    assert all(one is other for one, other in zip(args, expected_args, strict=True))
    assert kwargs.keys() == expected_kwargs.keys()
    assert all(kwargs[key] is expected_kwargs[key] for key in kwargs)


@pytest.mark.parametrize("value", [3, "text", None, iter([X])], ids=["int", "str", "None", "iterator"])
def test_other_example_inputs_are_refused_with_their_type(value):
    with pytest.raises(ValueError, match=f"example_inputs must be a dict .*, got {type(value).__name__}"):
        example_call(value)


def test_of_several_batches_the_largest_is_taken() -> None:
    batches = [{"x": torch.zeros(2, size), "y": torch.zeros(size)} for size in (3, 8, 5)]
    assert example_call(batches) == ((), batches[1])


def test_tensors_are_found_in_lists_and_dicts_of_objects_too():
    key, state = torch.zeros(2, 3), torch.zeros(4)
    cache = SimpleNamespace(layers=[SimpleNamespace(keys=key, states={0: state, 1: None}, length=torch.tensor(3))])
    assert [id(tensor) for tensor in tensors_inside(cache)] == [id(key), id(state)]
