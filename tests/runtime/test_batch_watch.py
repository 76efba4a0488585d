"""Batches that are larger than what was planned for."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import velora_fx
from tests.helpers.gradients import regions_of
from tests.helpers.notices import said_by
from tests.helpers.toys import Of, compressed_stack, rows, stack, without_dropout
from velora_fx.runtime import BatchWatch, watch_batches


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield


def said(model: Any, *batches: Any) -> list[str]:
    """What is warned of while the model trains on the batches."""
    texts = said_by(lambda: [model(batch).backward() for batch in batches])
    return [text for text in texts if text.startswith("velora_fx: planned for")]


def watched() -> nn.Module:
    """A stack that is planned for 4 texts of 8 tokens, of which nothing is compressed."""
    return copy.deepcopy(watched_once())


@cache
def watched_once() -> nn.Module:
    return velora_fx.optimize(without_dropout(stack()), 4, (rows(4, 8),))


def test_a_larger_batch_warns_once_a_model_with_both_numbers() -> None:
    model = compressed_stack()
    assert len(regions_of(model)) > 1
    (text,) = said(model, rows(8, 8), rows(16, 8), rows(8, 16))
    assert "planned for x of 4 x 8 x 32 = 1024, got 8 x 8 x 32 = 2048" in text


def test_a_longer_batch_warns_too() -> None:
    (text,) = said(compressed_stack(), rows(4, 9))
    assert "got 4 x 9 x 32 = 1152" in text


def test_a_batch_that_is_not_larger_never_warns() -> None:
    assert said(compressed_stack(), rows(4, 8), rows(3, 8), rows(4, 7), rows(1, 16), rows(1, 1)) == []


def test_a_plan_that_compresses_nothing_holds_for_its_batch_too() -> None:
    assert not velora_fx.plan_of(watched()).compressed
    assert len(said(watched(), rows(4, 8), rows(5, 8))) == 1


def test_larger_batches_in_evaluation_do_not_matter() -> None:
    model = compressed_stack()
    assert said_by(lambda: torch.no_grad()(model)(rows(8, 8))) == said_by(lambda: model.eval()(rows(8, 8))) == []
    assert len(said(model.train(), rows(8, 8))) == 1


def test_an_input_is_the_same_by_position_and_by_keyword() -> None:
    with pytest.warns(UserWarning, match="planned for x of"):
        velora_fx.optimize(stack(), 4, {"x": rows(4, 8)})(rows(5, 8))
    with pytest.warns(UserWarning, match="planned for x of"):
        watched()(x=rows(5, 8))


class Nested(nn.Sequential):
    """Takes a dict of tensors, and a list of others."""

    def forward(self, batch: dict[str, Tensor], *more: Any, scale: Tensor | None = None) -> Tensor:
        y = super().forward(batch["x"]).square().mean() + sum(item.mean() for item in more[0])
        return y if scale is None else y * scale


def test_inputs_inside_of_containers_are_named_and_compared() -> None:
    model = Nested(nn.Linear(32, 4))
    inputs = ({"x": rows()}, [rows(2), rows(3)]), {"scale": torch.ones(())}
    velora_fx.optimize(model, 4, inputs)
    found = [(item.name, item.shape, item.dtype) for item in velora_fx.plan_of(model).inputs]
    assert found == [
        ("batch.x", (4, 8, 32), "float32"),
        ("argument 1.0", (2, 8, 32), "float32"),
        ("argument 1.1", (3, 8, 32), "float32"),
        ("scale", (), "float32"),
    ]
    with pytest.warns(UserWarning, match=r"planned for argument 1\.1 of 3 x 8 x 32 = 768, got 4 x 8 x 32 = 1024"):
        model({"x": rows()}, [rows(2), rows(4)])


def test_the_first_training_forward_is_what_is_planned_for_where_there_are_no_example_inputs() -> None:
    model = velora_fx.optimize(stack(), 4)
    assert said(model, rows(4, 8), rows(4, 8)) == []
    assert len(said(model, rows(5, 8))) == 1


def test_planning_again_for_a_larger_batch_is_silent_and_then_that_batch_is() -> None:
    model = watched()
    assert said_by(lambda: velora_fx.plan(model, 4, (rows(16, 8),))) == []
    assert said_by(lambda: velora_fx.optimize(model, 4, (rows(8, 8),))) == []
    assert said(model, rows(8, 8)) == []
    assert len(said(model, rows(9, 8))) == 1


def test_a_restored_model_is_not_watched() -> None:
    model = velora_fx.restore(compressed_stack())
    assert said(model, rows(8, 8)) == []
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_watched_on_its_own_and_can_be_restored(copied: Any) -> None:
    model = compressed_stack()
    other = copied(model)
    for one in (model, other):
        assert len(said(one, rows(8, 8), rows(8, 8))) == 1
    velora_fx.restore(other)
    assert not other._forward_pre_hooks and model._forward_pre_hooks


@pytest.mark.parametrize(
    ("dynamic", "in_place"),
    [
        (None, False),
        (True, True),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((None, True), (True, False))),
    ],
)
def test_under_torch_compile_it_warns_without_a_graph_of_its_own(dynamic: bool | None, in_place: bool) -> None:
    counts: list[int] = []
    for model, is_watched in ((without_dropout(stack()), False), (watched(), True)):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        options: dict[str, Any] = {"backend": counter, "fullgraph": True, "dynamic": dynamic}
        if in_place:
            model.compile(**options)
        run = model if in_place else torch.compile(model, **options)
        assert said(run, rows(4, 8), rows(3, 8), rows(2, 8)) == []
        assert len(said(run, rows(6, 8), rows(7, 8), rows(2, 8))) == is_watched
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]


def test_compiled_with_a_larger_module_nothing_is_seen_and_nothing_is_compiled_anew() -> None:
    counts: list[int] = []
    for model in (without_dropout(stack()), watched()):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        outer = Of(lambda m, x: m.network(x) * 2, network=model)
        run = torch.compile(outer, backend=counter, fullgraph=True)
        assert said(run, rows(4, 8), rows(6, 8), rows(7, 8), rows(9, 8), rows(2, 8)) == []
        counts.append(counter.frame_count)
    assert counts == [2, 2]


def test_a_size_that_depends_on_values_is_left_alone_while_it_is_traced() -> None:
    inner = nn.Linear(4, 4)
    watch_batches(inner, {"input": (2, 4)})
    packed = Of(lambda m, x: m.network(x[x[:, 0] > 0]).sum(), network=inner)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        run = torch.compile(packed, backend="eager", fullgraph=True)
        assert said(run, torch.ones(5, 4), torch.ones(3, 4)) == []


def test_a_batch_of_as_many_entries_in_longer_texts_is_warned_of() -> None:
    model = watched()
    assert said(model, rows(8, 4), rows(2, 8)) == []
    assert len(said(model, rows(2, 16))) == 1


def test_the_watch_costs_no_state_and_no_forward() -> None:
    model, reference = watched(), stack()
    assert list(model.state_dict()) == list(reference.state_dict())
    assert "forward" not in vars(model)
    assert [type(hook) for hook in model._forward_pre_hooks.values()] == [BatchWatch]
