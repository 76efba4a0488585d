"""Blocks that recompute in backward: exact gradients, less memory, no trace in eval mode."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import velora_fx
from tests.end_to_end.test_memory import batch_of, bert, gpt2, llama, measured_peak
from tests.helpers.gradients import assert_same_gradients, step, tightest
from tests.helpers.toys import Block, Of, Stack, rows, stack, without_dropout
from tests.helpers.zoo import loss_of
from velora_fx.analyse import analyse
from velora_fx.options import Options
from velora_fx.runtime import Checkpointed, Notices, install_checkpointing


def ends(model: nn.Module, batch: Any, **options: Any) -> tuple[int, int]:
    """The smallest exactly reachable and the untouched peak."""
    with pytest.raises(velora_fx.BudgetError) as raised:
        velora_fx.plan(model, 1e-9, batch, method="exact", **options)
    return raised.value.smallest_peak_bytes, raised.value.plan.baseline.peak_bytes


def exactly(model: nn.Module, batch: Any, share: float, **options: Any) -> velora_fx.Plan:
    """Optimises the model exactly, the budget so far from the smallest reachable to the untouched peak."""
    smallest, untouched = ends(model, batch, **options)
    velora_fx.optimize(model, (smallest + share * (untouched - smallest) + 1) / 2**30, batch, method="exact", **options)
    return velora_fx.plan_of(model)


SLOW = ((llama, 0.0), (llama, 0.9), (gpt2, 0.5), (bert, 0.5))


@pytest.mark.parametrize(
    ("make", "share"), [(llama, 0.5), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_exact_plans_fit_the_budget_on_the_real_allocator_and_change_no_gradient(make: Any, share: float) -> None:
    torch.manual_seed(0)
    model = make().train()
    batch, reference = batch_of(model), copy.deepcopy(model)
    plan = exactly(model, batch, share)
    assert plan.recomputed and not plan.compressed and plan.exact is None
    expected, got = step(reference, batch, loss_of), step(model, batch, loss_of)
    assert torch.equal(got.loss, expected.loss)
    assert_same_gradients(model, reference)
    measured = measured_peak(model, batch)
    assert abs(plan.planned.peak_bytes - measured) <= 0.02 * measured
    assert plan.budget_bytes is not None and measured <= plan.budget_bytes * 1.002


@pytest.mark.slow
def test_what_is_cheap_is_recomputed_first() -> None:
    model = llama().train()
    generous, tight = (exactly(llama().train(), batch_of(model), share) for share in (0.9, 0.0))
    assert {block.recompute for block in generous.recomputed} == {"pointwise"}
    assert {block.recompute for block in tight.recomputed} == {"all"}
    assert generous.planned.step_seconds / generous.baseline.step_seconds > 1
    assert generous.planned.step_seconds < tight.planned.step_seconds


def test_compiled_as_a_whole_the_gradients_are_the_same() -> None:
    model, x = without_dropout(stack()), rows()
    reference = copy.deepcopy(model)
    install_checkpointing(model, {"blocks.0": "pointwise", "blocks.1": "all"}, Notices(None))
    reference(x).backward()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).backward()
    assert_same_gradients(model, reference)


def test_eval_and_no_grad_run_the_original_forward() -> None:
    model, calls = stack(), []
    original = Block.forward
    stand_in = Checkpointed("", model.blocks[0], "all", Notices(None))
    stand_in.original = lambda *args, **kwargs: calls.append(args) or original(model.blocks[0], *args, **kwargs)
    stand_in.install()
    model.eval()(rows()).backward()
    assert len(calls) == 1  # and not once more in backward
    with torch.no_grad():
        model.train()(rows())
    assert len(calls) == 2
    model(rows()).backward()
    assert len(calls) == 4  # once more in backward


X = (rows(64, 64, 64),)


@pytest.fixture(scope="module")
def plan() -> velora_fx.Plan:
    """Recomputes blocks of a stack."""
    return exactly(stack(width=64), X, 0.5, optimizer="sgd")


def test_restore_copies_and_pickles(plan: velora_fx.Plan) -> None:
    model = velora_fx.apply(stack(width=64), plan, X)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    names = [block.region for block in plan.recomputed]
    assert all(isinstance(vars(copied.get_submodule(name))["forward"], Checkpointed) for name in names)
    assert vars(copied.get_submodule(names[0]))["forward"].block is copied.get_submodule(names[0])
    velora_fx.restore(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_plan_that_recomputes_can_be_saved_and_applied_to_another_model(plan: velora_fx.Plan) -> None:
    model = velora_fx.apply(stack(width=64), velora_fx.Plan.from_json(plan.to_json()), X)
    recomputed = [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert recomputed == [block.region for block in plan.recomputed] != []
    other = velora_fx.Plan.from_json(plan.to_json().replace("blocks.0", "blocks.9"))
    with pytest.raises(ValueError, match=r"recomputes blocks\.9, which is no block of this model"):
        velora_fx.apply(stack(width=64), other, X)


class Counting(Block):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__(64)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        self.calls.add_(1)
        return super().forward(x, mask, cache)


def test_a_block_that_changes_its_buffers_is_never_run_twice() -> None:
    model = stack(width=64)
    model.blocks[1] = Counting()
    tight = tightest(model, X, method="exact")
    assert [block.region for block in tight.recomputed] == ["blocks.0"]  # of the last one it would free nothing
    offered = analyse(model, X, {}, Options(), torch.device("cpu"), lambda step: None).blocks
    assert [block.name for block in offered] == ["blocks.0", "blocks.2"]


def test_a_model_without_blocks_that_fits_no_budget_exactly_says_so() -> None:
    model = Of(lambda m, x: m.head(x).square().mean(), head=nn.Linear(32, 4))
    with pytest.raises(velora_fx.BudgetError, match="no plan fits"):
        velora_fx.plan(model, 1e-9, (rows(),), method="exact")


@pytest.mark.slow
@pytest.mark.parametrize(("share", "recomputes"), [(0.3, True), (0.7, False)])
def test_both_compression_and_recompute_fit_the_budget(share: float, recomputes: bool) -> None:
    torch.manual_seed(0)
    model = llama().train()
    batch = batch_of(model)
    smallest, untouched = ends(model, batch)
    budget = smallest + share * (untouched - smallest) + 1
    velora_fx.optimize(model, budget / 2**30, batch, method="auto")
    plan = velora_fx.plan_of(model)
    measured = measured_peak(model, batch)
    assert bool(plan.recomputed) == recomputes and (recomputes or plan.compressed)
    assert abs(plan.planned.peak_bytes - measured) <= 0.02 * measured
    assert measured <= budget * 1.002
    recomputed = {block.region for block in plan.recomputed}
    assert not recomputed & {decision.region for decision in plan.compressed}


@pytest.mark.slow
def test_a_plan_that_compresses_says_what_exact_recompute_would_do() -> None:
    model = llama().train()
    batch = batch_of(model)
    with pytest.raises(velora_fx.BudgetError) as raised:
        velora_fx.plan(model, 1e-9, batch, method="compress")
    tight = raised.value.plan
    budget = (tight.planned.peak_bytes + tight.baseline.peak_bytes) / 2
    plan = velora_fx.plan(model, budget / 2**30, batch, method="compress")
    exact = velora_fx.plan(model, budget / 2**30, batch, method="exact")
    assert plan.compressed and plan.exact is not None
    assert plan.exact.fits and plan.exact.peak_bytes == exact.planned.peak_bytes
    assert plan.exact.step_seconds == pytest.approx(exact.planned.step_seconds)
    ratio = exact.planned.step_seconds / exact.baseline.step_seconds
    assert f"also reachable exactly, step time x{ratio:.2f}" in str(plan)
    assert "recomputed in backward, exactly" in str(exact)
    assert "not reachable by recompute alone" in str(tight)


class Outside(Stack):
    """Checkpoints its blocks while it is told to."""

    use_reentrant: bool | None = None

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        for block in self.blocks:
            told = self.use_reentrant is not None
            x = checkpoint(block, x, use_reentrant=self.use_reentrant) if told else block(x)
        return self.head(x).square().mean()  # type: ignore[no-any-return]


def num_warnings(model: nn.Module, batch: Any, loss: Any) -> int:
    """How many warnings of two steps speak of gradient checkpointing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            step(model, batch, loss)
    return len([w for w in caught if "is under gradient checkpointing already" in str(w.message)])


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("method", ["compress", "exact"])
def test_blocks_that_their_caller_comes_to_checkpoint_are_spoken_of_once(method: str, use_reentrant: bool) -> None:
    torch.manual_seed(0)
    model, x = without_dropout(Outside(3, width=64)), rows(64, 64, 64).requires_grad_()
    plan = tightest(model, (x,), method=method)
    assert plan.compressed or plan.recomputed
    velora_fx.apply(model, plan, (x,))
    assert num_warnings(model, {"x": x}, lambda loss: loss) == 0
    model.use_reentrant = use_reentrant
    assert num_warnings(model, {"x": x}, lambda loss: loss) == 1


def test_a_block_that_comes_to_checkpoint_itself_is_recomputed_once() -> None:
    model = llama().train()
    batch, reference = batch_of(model), copy.deepcopy(model)
    velora_fx.apply(model, tightest(model, batch, method="exact"), batch)
    products = []
    for one in (model, reference):
        one.enable_input_require_grads()
        one.gradient_checkpointing_enable({"use_reentrant": False})
        with FlopCounterMode(display=False) as counter:
            assert num_warnings(one, batch, loss_of) == (one is model)
        products.append(counter.get_total_flops())
    assert products[0] == products[1]
    assert velora_fx.plan_of(model).in_effect.calls == 0
    assert_same_gradients(model, reference)


def test_blocks_that_were_planned_for_in_checkpoints_are_not_spoken_of() -> None:
    torch.manual_seed(0)
    model, x = without_dropout(Outside(3, width=64)), rows(64, 64, 64).requires_grad_()
    model.use_reentrant = False
    for options in ({}, {"gradients": "factored"}):
        velora_fx.apply(model, tightest(model, (x,), **options), (x,))
        assert num_warnings(model, {"x": x}, lambda loss: loss) == 0
