"""Every model of the zoo under its tightest plan, against the untouched model and float64."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn

import velora_fx
from tests.helpers.gradients import (
    assert_same_gradients,
    compressed_weights,
    rebuilt_inputs,
    regions_of,
    step,
    tightest,
)
from tests.helpers.zoo import ZOO, Case, loss_of
from velora_fx.capture import Call, key_of, make_graph
from velora_fx.runtime import make_call
from velora_fx.simulate import Saving, fake_copy, fake_mode
from velora_fx.simulate.saved_tensors import saved_tensors

QUICK = ("gpt2", "vit", "llama_lora")


@pytest.fixture(
    scope="module",
    params=[case if case.name in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in ZOO],
    ids=str,
)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def untouched(case: Case) -> nn.Module:
    model = case.build()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, and then the gradients of lora_A are zero whatever is done
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def plan(case: Case, untouched: nn.Module) -> velora_fx.Plan:
    return tightest(untouched, case.batch(*case.shapes[0]), loss_fn=loss_of)


@pytest.fixture(scope="module")
def optimized(case: Case, untouched: nn.Module, plan: velora_fx.Plan) -> nn.Module:
    model = copy.deepcopy(untouched)
    batch = case.batch(*case.shapes[0])
    return velora_fx.apply(model, plan, batch)


def test_outputs_are_bit_equal_at_the_captured_and_at_another_shape(
    case: Case, untouched: nn.Module, optimized: nn.Module
) -> None:
    for shape in case.shapes:
        batch = case.batch(*shape)
        expected, got = step(untouched, batch, loss_of), step(optimized, batch, loss_of)
        pairs = list(zip(_tensors(expected), _tensors(got), strict=True))
        assert pairs and all(torch.equal(a, b) for a, b in pairs)


def test_gradients_outside_the_compressed_weights_equal_the_untouched_models(
    case: Case, untouched: nn.Module, optimized: nn.Module
) -> None:
    exact = {name for name, _ in untouched.named_parameters()} - set(compressed_weights(optimized))
    for shape in case.shapes:
        batch = case.batch(*shape)
        step(untouched, batch, loss_of)
        step(optimized, batch, loss_of)
        assert_same_gradients(optimized, untouched, exact)


def test_compressed_weights_gradients_equal_the_rebuilt_input_in_float64(
    case: Case, untouched: nn.Module, optimized: nn.Module
) -> None:
    projections = compressed_weights(optimized)
    assert projections
    for shape in case.shapes:
        batch = case.batch(*shape)
        with rebuilt_inputs(untouched, projections):
            step(untouched, batch, loss_of)
        step(optimized, batch, loss_of)
        assert_same_gradients(optimized, untouched, set(projections))
        step(untouched, batch, loss_of)
        with pytest.raises(AssertionError, match="error"):
            assert_same_gradients(optimized, untouched, set(projections))


def test_padded_batches_are_exact_too(case: Case, untouched: nn.Module, optimized: nn.Module) -> None:
    if not case.paddable:
        pytest.skip("takes no padding")
    batch = case.batch(*case.shapes[0], padded=True)
    model = copy.deepcopy(optimized)
    expected, got = step(untouched, batch, loss_of), step(model, batch, loss_of)
    assert all(torch.equal(a, b) for a, b in zip(_tensors(expected), _tensors(got), strict=True))
    exact = {name for name, _ in untouched.named_parameters()} - set(compressed_weights(model))
    assert_same_gradients(model, untouched, exact)


def test_another_batch_size_and_length_runs_without_capturing_again(case: Case, optimized: nn.Module) -> None:
    if case.name == "swin":
        pytest.skip("its stages take the image size as Python numbers")
    model = copy.deepcopy(optimized)
    before = [len(region.graphs) for region in regions_of(model)]
    step(model, case.batch(*case.shapes[1]), loss_of)
    assert [len(region.graphs) for region in regions_of(model)] == before


def test_every_block_is_captured_whole_and_compressed_as_far_as_it_can_be(
    case: Case, optimized: nn.Module, plan: velora_fx.Plan
) -> None:
    assert not [note for note in plan.notes if "could not be captured" in note]
    names = {region.name for region in regions_of(optimized)}
    pattern = re.escape(case.block or "").replace(r"\{\}", r"\d+")
    blocks = [name for name, _ in optimized.named_modules() if re.fullmatch(pattern, name)]
    assert blocks
    for block in blocks:
        assert any(block == name or block.startswith(f"{name}.") or name == "" == block for name in names)
        inside = {c for d in plan.compressed for c in d.consumers if c.startswith(f"{block}." if block else "")}
        assert len(inside) >= case.compressible


def test_every_trainable_matrix_is_in_the_plan(case: Case, untouched: nn.Module, plan: velora_fx.Plan) -> None:
    listed = {consumer for decision in plan.decisions for consumer in decision.consumers}
    listed |= {skipped.module for skipped in plan.skipped}
    for name, module in untouched.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            is_matrix = parameter.requires_grad and parameter.dim() >= 2 and "embed" not in name.lower()
            if is_matrix and not isinstance(module, nn.Embedding) and "bias" not in parameter_name:
                owner = name if parameter_name == "weight" else f"{name}.{parameter_name}"
                assert owner in listed, owner


def test_shared_inputs_are_compressed_together_or_not_at_all(plan: velora_fx.Plan) -> None:
    for decision in plan.decisions:
        roles = {consumer.rpartition(".")[2] for consumer in decision.consumers}
        for family in ({"q_proj", "k_proj", "v_proj"}, {"query", "key", "value"}, {"gate_proj", "up_proj"}):
            if roles & family and "self" in decision.consumers[0]:
                assert roles == family


def test_saved_bytes_of_the_fake_and_the_real_run_are_equal_for_each_region(case: Case, optimized: nn.Module) -> None:
    model = copy.deepcopy(optimized)
    calls: dict[str, Call] = {}
    for region in regions_of(model):
        region.remove()
        hook = _recording(calls, region.name)
        region.block.register_forward_pre_hook(hook, with_kwargs=True)
    loss_of(model(**case.batch(*case.shapes[0])))
    for name, call in calls.items():
        model.get_submodule(name)._forward_pre_hooks.clear()
        gm = make_graph(call, key_of(call)).gm
        assert gm is not None
        with torch.random.fork_rng():
            real = saved_tensors(gm, call.tensors)
        fake = saved_tensors(gm, fake_copy(call.tensors, fake_mode()))
        assert _saved_bytes(real) == _saved_bytes(fake) > 0


def _recording(calls: dict[str, Call], name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[name] = make_call(module, args, kwargs)

    return hook


def _saved_bytes(savings: tuple[Saving, ...]) -> int:
    return sum({saving.storage: saving.num_bytes for saving in savings}.values())


def _tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output.detach()]
    if hasattr(output, "values"):
        output = list(output.values())
    return [leaf for value in output for leaf in _tensors(value)] if isinstance(output, (tuple, list)) else []
