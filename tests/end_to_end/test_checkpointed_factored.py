"""Factored gradients of blocks that recompute in backward: exact, and no more is kept than by checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import velora_fx
from tests.helpers.allocator import peak_of
from tests.helpers.factored import assert_same_weights, carriers, loss_value
from tests.helpers.gradients import tightest
from tests.helpers.peaks import assert_near, measured_peak, tensor_bytes, uncached_without_kernels
from tests.helpers.toys import Block, Stack, rows, without_dropout
from tests.helpers.zoo import loss_of
from velora_fx.capture import find_blocks
from velora_fx.runtime import Recompute


class Outside(Stack):
    """Checkpoints its blocks, as older models do in the forward of the parent, while it is told to."""

    is_told = True
    use_reentrant = False

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant) if self.is_told else block(x)
        return self.head(x).square().mean()  # type: ignore[no-any-return]


class Inside(Block):
    """Checkpoints all that it does in its own forward, while it is told to."""

    is_told = True
    use_reentrant = False

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        if not self.is_told:
            return super().forward(x)
        return checkpoint(super().forward, x, use_reentrant=self.use_reentrant)  # type: ignore[no-any-return]


class Partly(Inside):
    """Checkpoints a part of what it does."""

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        return super().forward(x + 1)


def outside() -> nn.Module:
    return Outside(3, width=64)


def inside(block: Callable[[], nn.Module] = lambda: Inside(64)) -> nn.Module:
    model = Stack(1, width=64)
    model.blocks = nn.ModuleList(block() for _ in range(3))
    return model


def hugging_face() -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=96, use_cache=False))
    model.enable_input_require_grads()
    return model


def partly() -> nn.Module:
    return inside(lambda: Partly(64))


MODELS: dict[str, Callable[[], nn.Module]] = {"outside": outside, "inside": inside, "hugging face": hugging_face}
TAKEN_APART = {"partly": partly}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return without_dropout({**MODELS, **TAKEN_APART}[name]()).double().train()  # type: ignore[no-any-return]


def batch_of(name: str) -> dict[str, Tensor]:
    if name != "hugging face":
        return {"x": rows(8, 32, 64).double().requires_grad_()}
    ids = torch.randint(4, 96, (8, 64), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def tell(model: nn.Module, is_told: bool, use_reentrant: bool) -> None:
    """Switches checkpointing."""
    if isinstance(model, LlamaForCausalLM):
        if is_told:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        else:
            model.gradient_checkpointing_disable()
    for module in model.modules():
        if isinstance(module, (Outside, Inside)):
            module.is_told, module.use_reentrant = is_told, use_reentrant  # type: ignore[misc]


def saved_bytes(model: nn.Module, batch: Any) -> int:
    """Bytes that are kept for backward besides parameters and buffers."""
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_value(model(**batch))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def factored(
    name: str, use_reentrant: bool, is_before: bool, target: str = "eager"
) -> tuple[nn.Module, velora_fx.Plan]:
    """A model with factored gradients, checkpointing switched on before or after it was planned for."""
    model, batch = made(name), batch_of(name)
    tell(model, is_before, use_reentrant)
    plan = tightest(model, batch, gradients="factored", optimizer="adamw", compiled=target == "inductor")
    velora_fx.apply(model, plan, batch)
    tell(model, True, use_reentrant)
    return model, plan


@pytest.mark.parametrize(
    ("name", "is_before", "use_reentrant"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] * (case[0] == "hugging face"))
        for case in (*product(MODELS, [True, False], [False, True]), *product(TAKEN_APART, [True], [False, True]))
    ],
)
def test_it_trains_as_the_dense_plan_without_checkpointing_and_keeps_no_more_than_checkpointing_does(
    name: str, use_reentrant: bool, is_before: bool
) -> None:
    ours, plan = factored(name, use_reentrant, is_before)
    batch = batch_of(name)
    reference = made(name)
    tell(reference, False, use_reentrant)
    untouched = saved_bytes(reference, batch)
    velora_fx.apply(reference, replace(plan, gradients="dense"), batch)
    checkpointed = made(name)
    tell(checkpointed, True, use_reentrant)
    start = copy.deepcopy(reference)
    assert len(carriers(ours)) >= 2 * 3
    expected = saved_bytes(checkpointed, batch)
    head = 8 * 64 * 64 * 8  # the head's input may be kept as projections besides
    assert saved_bytes(ours, batch) <= expected + head < 0.6 * untouched
    for model in (ours, reference):
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            loss_value(model(**batch)).backward()
            optimizer.step()
    assert_same_weights(ours, reference, start)


def test_a_block_that_comes_to_checkpoint_a_part_of_itself_is_refused_rather_than_left_untrained() -> None:
    model, _ = factored("partly", False, False)
    with pytest.raises(RuntimeError, match="recomputes a part of what it does"):
        model(**batch_of("partly"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "is_before"), product(("inside", "outside", "hugging face"), (True, False)))
def test_compiled_as_a_whole_it_trains_as_eagerly(name: str, is_before: bool) -> None:
    torch._dynamo.reset()
    ours, _ = factored(name, False, is_before, target="inductor")
    batch, start = batch_of(name), copy.deepcopy(ours)
    eager = copy.deepcopy(ours)
    for model, run in ((ours, torch.compile(ours, backend="aot_eager")), (eager, eager)):
        optimizer = torch.optim.AdamW(model.parameters())
        loss_value(run(**batch)).backward()
        optimizer.step()
    assert_same_weights(ours, eager, start)


@pytest.mark.parametrize("name", MODELS)
def test_the_planned_peak_is_the_allocators(name: str) -> None:
    model = made(name).float()
    batch = {key: value.float() if value.is_floating_point() else value for key, value in batch_of(name).items()}
    tell(model, True, False)
    plan = tightest(model, batch, gradients="factored", optimizer="sgd")
    assert_near(plan.baseline.peak_bytes, measured_peak(model, batch, loss_of=loss_value), "eager")
    velora_fx.apply(model, plan, batch)
    assert_near(plan.planned.peak_bytes, measured_peak(model, batch, loss_of=loss_value), "eager")
    decisions = [decision for decision in plan.compressed if decision.region]
    assert decisions and all(d.update_bytes_after < d.update_bytes_before for d in decisions)
    inner = [d for d in decisions if "head" not in d.region]
    assert {d.bytes_before for d in inner} == {d.bytes_after for d in inner} == {0}


@pytest.mark.parametrize("name", MODELS)
def test_with_dense_gradients_nothing_is_compressed_there_and_it_is_said_once(name: str) -> None:
    model, batch = made(name), batch_of(name)
    tell(model, True, False)
    plan = tightest(model, batch)
    assert not [d for d in plan.decisions if "head" not in d.region]
    assert len([note for note in plan.notes if "gradients='factored' makes" in note]) == 1
    reasons = {skipped.reason for skipped in plan.skipped if "head" not in skipped.module}
    assert reasons == {"it is recomputed in backward (gradient checkpointing), so nothing is kept for it"}


def test_the_loss_of_a_checkpointed_model_is_that_of_the_untouched_one() -> None:
    ours, _ = factored("hugging face", False, True)
    reference = made("hugging face")
    assert torch.equal(loss_of(ours(**batch_of("hugging face"))), loss_of(reference(**batch_of("hugging face"))))


@pytest.mark.parametrize("level", ["pointwise", "all"])
def test_a_block_is_compressed_and_recomputed_where_neither_alone_meets_the_budget(level: Recompute) -> None:
    torch.manual_seed(0)
    model, batch = without_dropout(Stack(3, width=64)).double().train(), {"x": rows(32, 64, 64).double()}
    plan = tightest(model, batch, method="auto", gradients="factored", optimizer="adamw", sub_token_sizes=(8,))
    compressed = {decision.region for decision in plan.compressed}
    assert len(plan.recomputed) == 3 and {block.region for block in plan.recomputed} <= compressed
    assert_near(plan.planned.peak_bytes, measured_peak_with_adamw(model, plan, batch), "eager")
    models = [
        velora_fx.apply(copy.deepcopy(model), replace(plan, recomputed=blocks), batch)
        for blocks in (tuple(replace(block, recompute=level) for block in plan.recomputed), ())
    ]
    start = copy.deepcopy(models[0])
    for one in models:
        optimizer = torch.optim.AdamW(one.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            one(**batch).backward()
            optimizer.step()
    assert_same_weights(models[0], models[1], start)


@pytest.mark.parametrize("compiled", ["blocks", pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_blocks_that_are_compressed_and_recomputed_take_what_is_planned(compiled: bool | str) -> None:
    torch.manual_seed(0)
    model, batch = without_dropout(Stack(3, width=64)).double().train(), {"x": rows(32, 64, 64).double()}
    options = {"gradients": "factored", "optimizer": "adamw", "sub_token_sizes": (8,), "compiled": compiled}
    plan = tightest(model, batch, method="auto", **options)
    assert len(plan.recomputed) == 3 and len(plan.compressed) >= 6
    assert_near(plan.planned.peak_bytes, measured_peak_with_adamw(model, plan, batch), "inductor")


def measured_peak_with_adamw(model: nn.Module, plan: velora_fx.Plan, batch: dict[str, Tensor]) -> int:
    """Of the second step of a copy with the plan applied, run as it was planned for."""
    planned = velora_fx.apply(copy.deepcopy(model), plan, batch)
    optimizer = torch.optim.AdamW(planned.parameters())
    torch._dynamo.reset()
    run = torch.compile(planned, fullgraph=True) if plan.compiled is True else planned
    for block in find_blocks(planned).values() if plan.compiled == "blocks" else ():
        block.compile(fullgraph=True)

    def step() -> None:
        run(**batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    with uncached_without_kernels():
        step()
        states = [value for state in optimizer.state.values() for value in state.values()]
        return tensor_bytes([*planned.parameters(), *planned.buffers(), *states, *batch.values()]) + peak_of(step)
