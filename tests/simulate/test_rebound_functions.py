"""Functions in the place of forwards are planned for as they run: copies of a model have copies of them."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import velora_fx
from tests.helpers.gradients import compressed_weights, tightest
from tests.helpers.toys import Of, compressed, rows, stack, without_dropout
from velora_fx.simulate import fake_copy, fake_mode

OLD: Any = None


def closure(module: nn.Module) -> Any:
    old = module.forward
    return lambda *args, **kwargs: old(*args, **kwargs)


def nested_closures(module: nn.Module) -> Any:
    module.forward = closure(module)
    return closure(module)


def method(module: nn.Module) -> Any:
    old = module.forward

    @functools.wraps(type(module).forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        assert self is old.__self__
        return old(*args, **kwargs)

    return types.MethodType(forward, module)


def of_a_partial(module: nn.Module) -> Any:
    return functools.partial(lambda old, *args, **kwargs: old(*args, **kwargs), module.forward)


def held_by_an_object(module: nn.Module) -> Any:
    class Caller:
        def __init__(self, old: Any) -> None:
            self.old = old

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.old(*args, **kwargs)

        def __getstate__(self) -> Any:
            raise TypeError("it cannot be pickled, as what accelerate puts there cannot")

    caller = Caller(closure(module))
    return lambda *args, **kwargs: caller(*args, **kwargs)


def through_a_global(module: nn.Module) -> Any:
    global OLD
    OLD = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return OLD(*args, **kwargs)

    return forward


def with_a_parameter(module: nn.Module) -> Any:
    parts = module.up, module.down.weight, module.down.bias  # type: ignore[union-attr]
    norm = module.norm
    return lambda x, *_: x + nn.functional.linear(nn.functional.gelu(parts[0](norm(x))), *parts[1:])  # type: ignore


Way = Callable[[nn.Module], Any]
WAYS: tuple[Way, ...] = (closure, nested_closures, method, of_a_partial, held_by_an_object, through_a_global)


@pytest.fixture(scope="module")
def untouched() -> velora_fx.Plan:
    return tightest(stack(), (rows(),))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_replaced_forward_of_the_model_is_planned_for_as_it_runs(way: Way, untouched: velora_fx.Plan) -> None:
    model = stack()
    model.forward = way(model)
    plan = tightest(model, (rows(),))
    assert plan.compressed == untouched.compressed
    peaks = [(one.planned.peak_bytes, one.planned.breakdown) for one in (plan, untouched)]
    assert peaks[0] == peaks[1]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("way", WAYS[:-1], ids=lambda way: way.__name__)
def test_blocks_whose_forward_is_replaced_are_compressed(way: Way) -> None:
    model, reference = without_dropout(stack()), without_dropout(stack())
    for block in (*model.blocks, *reference.blocks):
        block.forward = way(block)
    compressed(model, rows())
    assert {f"blocks.{number}.up.weight" for number in range(3)} <= set(compressed_weights(model))
    assert torch.equal(model(rows()), reference(rows()))


def test_a_function_that_holds_a_parameter_itself_is_left_as_it_is_and_the_plan_says_so() -> None:
    model, reference = stack(), stack()
    for block in (*model.blocks, *reference.blocks):
        block.forward = with_a_parameter(block)
    compressed(model, rows())
    assert any("takes a parameter from elsewhere" in note for note in velora_fx.plan_of(model).notes)
    loss, expected = model(rows()), reference(rows())
    loss.backward()
    expected.backward()
    assert torch.equal(loss, expected)
    for own, other in zip(model.blocks.parameters(), reference.blocks.parameters(), strict=True):
        assert own.grad is not None and own.grad.shape == other.grad.shape


def test_an_untouched_function_is_itself_in_a_copy_and_the_models_own_stay() -> None:
    model = stack()
    model.activation, model.forward = nn.functional.silu, closure(model)
    own = model.forward
    copied = fake_copy(model, fake_mode())
    assert copied.activation is model.activation
    assert copied.forward is not own is model.forward
    assert copied.forward.__closure__[0].cell_contents.__self__ is copied
    assert own.__closure__[0].cell_contents.__self__ is model


def replacing(model: nn.Module) -> Any:
    """A forward that calls the parts of the model, and not the forward that was there."""
    kind = type(model)
    return types.MethodType(lambda self, *args: kind.forward(self, *args), model)


def test_a_model_whose_forward_is_replaced_before_its_first_step_is_planned_in_that_step(untouched: Any) -> None:
    model = velora_fx.apply(stack(), untouched)
    model.forward = replacing(model)
    model(rows()).backward()
    assert velora_fx.plan_of(model).compressed == untouched.compressed
    assert compressed_weights(model)
    velora_fx.restore(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_replaced_forward_that_is_called_without_hooks_is_planned_at_its_second_step(untouched: Any) -> None:
    """As PEFT's adapters call it."""
    model = velora_fx.apply(stack(), untouched)
    model.forward = replacing(model)
    outer = Of(lambda m, x: m.model.forward(x), model=model)
    for _ in range(2):
        outer(rows()).backward()
    assert velora_fx.plan_of(outer).compressed == untouched.compressed
    assert compressed_weights(model)


def test_a_copy_of_a_compiled_model_is_not_compiled() -> None:
    model = stack()
    model.compile(backend="eager")
    model.blocks[0].compile(backend="eager")
    copied = fake_copy(model, fake_mode(), torch.device("cpu"))
    assert [name for name, module in copied.named_modules() if module._compiled_call_impl is not None] == []
