"""What is said in training: each reason once, for all blocks of a model, and none is lost."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import velora_fx
from tests.helpers.notices import said_by
from tests.helpers.toys import Of, compressed_stack, rows, stack, stack_plan, without_dropout
from velora_fx.plans import Recomputed
from velora_fx.runtime.region import MAX_GRAPHS


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield


def hooked(model: nn.Module) -> None:
    for block in model.blocks:
        block.up.register_forward_hook(lambda *_: None)


def test_a_reason_that_holds_for_all_blocks_is_said_once() -> None:
    model = compressed_stack()
    hooked(model)
    (text,) = said_by(lambda: [model(rows()) for _ in range(2)])
    assert "blocks.0 runs its original forward, exactly: up in it has hooks" in text and "said once" in text


def test_another_reason_is_said_too() -> None:
    model = compressed_stack()
    model.blocks[1].requires_grad_(False)
    (first,) = said_by(lambda: model(rows()))
    assert "is trained" in first
    hooked(model)
    (second,) = said_by(lambda: model(rows()))
    assert "has hooks" in second


def test_after_a_harmless_warning_too_many_kinds_of_calls_are_not_silent_and_what_differs_is_named() -> None:
    model = compressed_stack()
    model.blocks[1].requires_grad_(False)
    assert len(said_by(lambda: model(rows()))) == 1

    def many() -> None:
        for number in range(MAX_GRAPHS):
            for block in model.blocks:
                block.dropout.p = number / 100
            model(rows())

    (text,) = said_by(many)
    assert "more than 8 different ways" in text and "dropout.p is 0.03, not 0." in text


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_says_for_itself_what_was_not_said_before(copied: Any) -> None:
    model = compressed_stack()
    model.blocks[1].requires_grad_(False)
    other = copied(model)
    assert len(said_by(lambda: other(rows()))) == len(said_by(lambda: model(rows()))) == 1
    assert said_by(lambda: copied(other)(rows())) == []


def test_an_eager_plan_says_once_that_its_model_is_compiled_with_the_line_to_change() -> None:
    model = compressed_stack(has_dropout=False)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    (text,) = said_by(lambda: [run(rows()), run(rows(3, 5))])
    assert "runs under torch.compile" in text and "compiled=True" in text


def test_an_eager_plan_of_blocks_that_are_compiled_one_by_one_says_so_too() -> None:
    model = compressed_stack(has_dropout=False)
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    assert len(said_by(lambda: model(rows()))) == 1


def test_a_compiled_plan_says_once_that_its_model_goes_on_running_eagerly() -> None:
    model = compressed_stack(is_compiled=True, has_dropout=False)
    (text,) = said_by(lambda: [model(rows()) for _ in range(8)])
    assert "runs eagerly" in text and "torch.compile" in text


def test_a_compiled_plan_is_silent_where_it_is_compiled() -> None:
    model = compressed_stack(is_compiled=True, has_dropout=False)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert said_by(lambda: [run(rows()) for _ in range(8)]) == []


@pytest.mark.parametrize("planned", [True, "blocks"])
@pytest.mark.parametrize("ran", [True, "blocks"])
@pytest.mark.parametrize("recomputes", [False, True])
def test_a_compiled_plan_says_once_that_the_model_is_compiled_in_the_other_way(
    planned: Any, ran: Any, recomputes: bool
) -> None:
    model = without_dropout(stack())
    plan = replace(stack_plan(), compiled=planned)
    if recomputes:
        blocks = tuple(Recomputed(f"blocks.{number}", "all") for number in range(3))
        plan = replace(plan, decisions=(), recomputed=blocks)
    velora_fx.apply(model, plan, (rows(),))
    run = model
    if ran is True:
        run = torch.compile(model, backend="aot_eager", fullgraph=True)
    else:
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
    said = said_by(lambda: [run(rows()) for _ in range(2)])
    texts = {True: "compiled in one graph with others", "blocks": "is compiled by itself"}
    assert len(said) == (planned != ran) and all(texts[ran] in text for text in said)


def test_an_eager_plan_of_recompute_alone_says_that_its_model_is_compiled() -> None:
    model = without_dropout(stack())
    plan = replace(stack_plan(), decisions=(), recomputed=(Recomputed("blocks.1", "all"),))
    velora_fx.apply(model, plan, (rows(),))
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    (text,) = said_by(lambda: [run(rows()) for _ in range(2)])
    assert "runs under torch.compile" in text


def test_a_fall_back_in_compiled_code_is_said_with_what_differs() -> None:
    outer = Of(
        lambda m, x: m.inner(x, torch.ones(4, 8, 1)), inner=compressed_stack(is_compiled=True, has_dropout=False)
    )
    run = torch.compile(outer, backend="aot_eager", fullgraph=True)
    (text,) = said_by(lambda: run(rows()))
    assert "compiled for a call unlike those that were planned for" in text
    assert "argument 1 is a float32 tensor of 3 dimensions on cpu, not None" in text
