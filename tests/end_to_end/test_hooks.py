"""Hooks on modules inside of blocks: those that do something are called, idle ones do not matter."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import velora_fx
from tests.helpers.factored import carriers
from tests.helpers.gradients import (
    assert_same_gradients,
    compressed_weights,
    rebuilt_inputs,
    regions_of,
    step,
    tightest,
)
from tests.helpers.toys import compressed, rows, stack
from tests.helpers.zoo import loss_of
from velora_fx.plans import InEffect


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "attn_implementation": "eager",
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, use_cache=False)).train()


def ids() -> dict[str, Any]:
    tokens = torch.randint(4, 64, (2, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "labels": tokens}


def planned(**options: Any) -> LlamaForCausalLM:
    model = llama()
    velora_fx.apply(model, tightest(model, ids(), **options), ids())
    return model


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_after_outputs_were_asked_for_in_evaluation_training_is_as_before(asked: str) -> None:
    model = planned()
    reference = copy.deepcopy(model)
    model.eval()
    with torch.no_grad():
        assert model(**ids(), **{asked: True}).to_tuple()
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, ids(), loss_of)
    step(reference, ids(), loss_of)
    assert_same_gradients(model, reference)
    with rebuilt_inputs(untouched := llama(), compressed_weights(model)):
        step(untouched, ids(), loss_of)
    assert_same_gradients(model, untouched)


def test_factored_gradients_go_on_after_outputs_were_asked_for() -> None:
    model = planned(gradients="factored")
    with torch.no_grad():
        model(**ids(), output_hidden_states=True)
    step(model, ids(), loss_of)
    assert all(carrier.grad is not None for carrier in carriers(model).values())


def test_hidden_states_of_a_training_step_come_from_compressed_blocks() -> None:
    model = planned(gradients="factored")
    expected = llama()(**ids(), output_hidden_states=True).hidden_states
    output = step(model, {**ids(), "output_hidden_states": True}, loss_of)
    assert len(output.hidden_states) == len(expected) == 3
    assert all(torch.equal(a, b) for a, b in zip(output.hidden_states, expected, strict=True))


def test_attentions_that_are_asked_for_in_training_are_there_and_the_next_step_is_compressed() -> None:
    model, reference = planned(), llama()
    expected = step(reference, {**ids(), "output_attentions": True}, loss_of).attentions
    with pytest.warns(UserWarning, match="self_attn in it has hooks") as caught:
        got = step(model, {**ids(), "output_attentions": True}, loss_of).attentions
    assert len(caught) == 1
    assert len(got) == len(expected) == 2 and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert_same_gradients(model, reference)
    step(model, ids(), loss_of)
    with rebuilt_inputs(reference, compressed_weights(model)):
        step(reference, ids(), loss_of)
    assert_same_gradients(model, reference)


def test_idle_hooks_that_are_there_before_planning_do_not_matter() -> None:
    model = llama()
    with torch.no_grad():
        model(**ids(), output_attentions=True)
    velora_fx.apply(model, tightest(model, ids()), ids())
    assert {region.name for region in regions_of(model)} >= {"model.layers.0", "model.layers.1"}


@pytest.mark.slow
def test_compiled_as_a_whole_idle_hooks_do_not_matter() -> None:
    torch._dynamo.reset()
    model = planned(compiled=True)
    eager = copy.deepcopy(model)
    with torch.no_grad():
        model(**ids(), output_hidden_states=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="velora_fx")
        step(torch.compile(model, backend="aot_eager"), ids(), loss_of)
    step(eager, ids(), loss_of)
    assert_same_gradients(model, eager)


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_weight_that_a_hook_computes_stays_exact_and_the_plan_says_why(wrap: Any) -> None:
    torch.manual_seed(0)
    model, reference = stack(), stack()
    for one in (model, reference):
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrap(one.blocks[1].up)
    model = compressed(model, rows())
    plan = velora_fx.plan_of(model)
    assert "blocks.1.up" not in {name for decision in plan.compressed for name in decision.consumers}
    assert any("blocks.1.up" in note for note in plan.notes)
    with rebuilt_inputs(reference, compressed_weights(model)):
        step(reference, {"x": rows()}, lambda loss: loss)
    step(model, {"x": rows()}, lambda loss: loss)
    assert_same_gradients(model, reference)


def test_a_forward_that_was_replaced_inside_of_a_block_is_not_passed_over() -> None:
    model, reference = stack(), stack()
    for one in (model, reference):
        up = one.blocks[0].up
        up.forward = lambda x, up=up: type(up).forward(up, x) * 2
    model = compressed(model, rows())
    torch.manual_seed(5)
    expected = reference(rows())
    torch.manual_seed(5)
    assert torch.equal(model(rows()), expected)


def test_the_report_says_how_many_calls_of_how_many_regions_ran_compressed() -> None:
    model = planned()
    assert velora_fx.plan_of(model).in_effect is None
    regions = len(regions_of(model))
    for _ in range(2):
        model(**ids()).loss.backward()
    assert f"in effect       {regions} of {regions} blocks, {2 * regions} of {2 * regions} calls" in str(
        velora_fx.plan_of(model)
    )
    handle = regions_of(model)[0].block.mlp.register_forward_hook(lambda module, args, output: None)
    with pytest.warns(UserWarning, match="runs its original forward"):
        model(**ids()).loss.backward()
    handle.remove()
    plan = velora_fx.plan_of(model)
    assert plan.in_effect == InEffect(regions, regions, 3 * regions - 1, 3 * regions)
    assert velora_fx.Plan.from_json(plan.to_json()).in_effect == plan.in_effect
