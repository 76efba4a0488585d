"""What is said in training: each reason once, for all blocks of a model, and none is lost."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.toys import compressed, rows, stack, without_dropout
from velora_fx.runtime.region import MAX_GRAPHS


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield


def said(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught if str(warning.message).startswith("velora_fx")]


def compiled_plan() -> nn.Module:
    return copy.deepcopy(compiled_plan_once())


@cache
def compiled_plan_once() -> nn.Module:
    return compressed(without_dropout(stack()), rows(), compiled=True)


def hooked(model: nn.Module) -> None:
    for block in model.blocks:
        block.up.register_forward_hook(lambda *_: None)


def test_a_reason_that_holds_for_all_blocks_is_said_once() -> None:
    model = compressed(stack(), rows())
    hooked(model)
    (text,) = said(lambda: [model(rows()) for _ in range(2)])
    assert "blocks.0 runs its original forward, exactly: up in it has hooks" in text and "said once" in text


def test_another_reason_is_said_too() -> None:
    model = compressed(stack(), rows())
    model.blocks[1].requires_grad_(False)
    (first,) = said(lambda: model(rows()))
    assert "is trained" in first
    hooked(model)
    (second,) = said(lambda: model(rows()))
    assert "has hooks" in second


def test_after_a_harmless_warning_too_many_kinds_of_calls_are_not_silent_and_what_differs_is_named() -> None:
    model = compressed(stack(num_blocks=2), rows())
    model.blocks[1].requires_grad_(False)
    assert len(said(lambda: model(rows()))) == 1

    def many() -> None:
        for number in range(MAX_GRAPHS):
            for block in model.blocks:
                block.dropout.p = number / 100
            model(rows())

    (text,) = said(many)
    assert "more than 8 different ways" in text and "dropout.p is 0.03, not 0." in text


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_says_for_itself_what_was_not_said_before(copied: Any) -> None:
    model = compressed(stack(), rows())
    model.blocks[1].requires_grad_(False)
    other = copied(model)
    assert len(said(lambda: other(rows()))) == len(said(lambda: model(rows()))) == 1
    assert said(lambda: copied(other)(rows())) == []


def test_an_eager_plan_says_once_that_its_model_is_compiled_with_the_line_to_change() -> None:
    model = compressed(without_dropout(stack()), rows())
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    (text,) = said(lambda: [run(rows()), run(rows(3, 5))])
    assert "runs under torch.compile" in text and "compiled=True" in text


def test_an_eager_plan_of_blocks_that_are_compiled_one_by_one_says_so_too() -> None:
    model = compressed(without_dropout(stack()), rows())
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    assert len(said(lambda: model(rows()))) == 1


def test_a_compiled_plan_says_once_that_its_model_goes_on_running_eagerly() -> None:
    model = compiled_plan()
    (text,) = said(lambda: [model(rows()) for _ in range(8)])
    assert "runs eagerly" in text and "torch.compile" in text


def test_a_compiled_plan_is_silent_where_it_is_compiled() -> None:
    model = compiled_plan()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert said(lambda: [run(rows()) for _ in range(8)]) == []


def test_a_fall_back_in_compiled_code_is_said_with_what_differs() -> None:
    model = compiled_plan()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> Any:
            return self.inner(x, torch.ones(4, 8, 1))

    run = torch.compile(Outer(), backend="aot_eager", fullgraph=True)
    (text,) = said(lambda: run(rows()))
    assert "compiled for a call unlike those that were planned for" in text
    assert "argument 1 is a float32 tensor of 3 dimensions on cpu, not None" in text
