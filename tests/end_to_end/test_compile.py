"""torch.compile on optimised models."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor.utils import fresh_cache

import velora_fx
from tests.helpers.gradients import assert_same_gradients, step, tightest
from tests.helpers.toys import compressed, rows, stack, without_dropout
from tests.helpers.zoo import ZOO, loss_of


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with fresh_cache():
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_inductors_gradients_equal_the_eager_ones_with_dynamic_shapes(name: str) -> None:
    case = next(case for case in ZOO if case.name == name)
    model = case.build()
    for module in model.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    model = without_dropout(model)
    batch = case.batch(*case.shapes[0])
    velora_fx.apply(model, tightest(model, batch), batch)
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for shape in case.shapes:
        step(compiled, case.batch(*shape), loss_of)
        step(eager, case.batch(*shape), loss_of)
        assert_same_gradients(model, eager)
    assert 1 <= counter.frame_count <= 2  # one more for dynamic shapes, none for each shape


@pytest.mark.slow
@pytest.mark.parametrize("stretch", ["no_grad", "autocast"])
def test_state_stretches_compile_with_dynamic_shapes(stretch: str) -> None:
    model = without_dropout(compressed(without_dropout(stack(stretch)), rows()))
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((4, 8), (3, 5)):
        step(compiled, {"x": rows(*shape)}, loss_of)
        step(eager, {"x": rows(*shape)}, loss_of)
        assert_same_gradients(model, eager)


def saved_sizes(model: nn.Module, x: torch.Tensor) -> list[int]:
    """Entries of each tensor that the compiled forward computes for backward."""
    sizes: list[int] = []

    def forward_compiler(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        output = next(node for node in gm.graph.nodes if node.op == "output")
        sizes.extend(node.meta["val"].numel() for node in output.args[0][1:] if node.op != "placeholder")
        return make_boxed_func(gm.forward)

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        return aot_module_simplified(gm, inputs, forward_compiler, lambda gm, _: make_boxed_func(gm.forward))

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(x).backward()
    return sizes


def test_the_compiled_forward_does_not_save_a_compressed_input() -> None:
    x = rows(4, 16)
    dense = saved_sizes(without_dropout(stack()), x)
    velora = saved_sizes(compressed(without_dropout(stack()), x, sub_token_sizes=(8,)), x)
    hidden, projected = 4 * 16 * 64, 4 * 16 * 64 // 8
    assert dense.count(hidden) == 2 * 3  # in and out of each GELU
    assert velora.count(hidden) == 3  # in only
    assert projected not in dense
    assert velora.count(projected) == 3


@pytest.mark.slow
def test_a_mask_that_only_a_compiler_makes_is_planned_for() -> None:
    case = next(case for case in ZOO if case.name == "llama")
    batch = case.batch(2, 16)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])  # an eager step drops a mask that masks nothing

    def compressing_nodes(model: nn.Module) -> int:
        found: list[Any] = []

        def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            found.extend(node for node in gm.graph.nodes if "velora" in str(node.target))
            return gm.forward

        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.compile(model, backend=backend, fullgraph=True)(**batch)
        return len(found)

    model = case.build()
    velora_fx.apply(model, tightest(model, batch, compiled=True), batch)
    assert compressing_nodes(model) > 0


def test_a_call_that_was_not_planned_for_warns_while_it_is_compiled() -> None:
    model = compressed(without_dropout(stack()), rows())
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.warns(UserWarning, match="compiled for a call unlike those that were planned for"):
        compiled(rows(), torch.ones(()))


def test_equal_blocks_compiled_one_by_one_give_as_many_graphs_as_there_are_plans() -> None:
    model = without_dropout(stack(num_blocks=12))
    tight = tightest(model, (rows(),))
    half = tuple(d for d in tight.decisions if int(d.region.rpartition(".")[2] if d.region != "head" else 0) < 6)
    plan = copy.copy(tight)
    object.__setattr__(plan, "decisions", half)
    velora_fx.apply(model, plan, (rows(),))
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    x = rows().requires_grad_()  # as the input of every other block does
    step(model, {"x": x}, loss_of)
    step(eager, {"x": x}, loss_of)
    assert_same_gradients(model, eager)
    assert counter.frame_count == 2


def test_fullgraph_before_planning_is_an_error_that_says_what_to_pass() -> None:
    model = torch.compile(velora_fx.optimize(stack(), 1), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"pass example_inputs to velora_fx\.optimize"):
        model(rows())


def test_without_fullgraph_planning_happens_in_the_first_compiled_forward_and_for_compiled_steps() -> None:
    budget = tightest(stack(num_blocks=1), (rows(16, 32),), compiled=True).planned.peak_bytes * 1.02 / 2**30
    model = velora_fx.optimize(without_dropout(stack(num_blocks=1)), budget, method="compress", optimizer="none")
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        step(compiled, {"x": rows(16, 32)}, loss_of)
    plan = velora_fx.plan_of(compiled)
    assert plan.compressed and plan.compiled
    eager = velora_fx.apply(without_dropout(stack(num_blocks=1)), plan, (rows(16, 32),))
    step(eager, {"x": rows(16, 32)}, loss_of)
    assert_same_gradients(model, eager)
