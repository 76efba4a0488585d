"""Models put together by chance: numbers are the untouched model's, peaks are those of the plan."""

from __future__ import annotations

import contextlib
import copy

import pytest

import velora_fx
from tests.helpers.generated import batch, generated
from tests.helpers.gradients import assert_same_gradients, compressed_weights, step, tightest
from tests.helpers.peaks import assert_only_compressed_gradients_differ, assert_predicted, measured_peak, scalar

FAST, SLOW = range(4), range(4, 16)
SEEDS = [*FAST, *(pytest.param(seed, marks=pytest.mark.slow) for seed in SLOW)]
EXACTLY = 0.001


@pytest.mark.parametrize("seed", SEEDS)
def test_an_eager_step_has_the_predicted_peak_and_exact_numbers(seed: int) -> None:
    model = generated(seed)
    predicted = assert_predicted(model, batch(), "eager")
    for num_bytes, made in ((predicted.untouched_bytes, model), (predicted.compressed_bytes, predicted.compressed)):
        assert abs(num_bytes / measured_peak(made, batch()) - 1) <= EXACTLY
    assert_only_compressed_gradients_differ(predicted, model, batch(), "eager")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_compiled_step_has_the_predicted_peak_and_exact_numbers(seed: int) -> None:
    model = generated(seed)
    predicted = assert_predicted(model, batch(), "inductor")
    assert_only_compressed_gradients_differ(predicted, model, batch(), "inductor")


@pytest.mark.parametrize("seed", [*range(2), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))])
@pytest.mark.parametrize("is_first", [False, True])
def test_checkpointed_before_or_after_planning_the_numbers_are_exact(seed: int, is_first: bool) -> None:
    model = generated(seed)
    reference = copy.deepcopy(model)
    model.is_checkpointed = is_first
    plan = tightest(model, batch())
    velora_fx.apply(model, plan, batch())
    model.is_checkpointed = reference.is_checkpointed = True
    comes_later = pytest.warns(UserWarning, match="is under gradient checkpointing already")
    with contextlib.nullcontext() if is_first else comes_later:
        losses = [step(one, batch(), scalar) for one in (model, reference)]
    assert losses[0] == losses[1]
    approximate = set(compressed_weights(model))
    assert approximate
    assert_same_gradients(model, reference, {name for name, _ in model.named_parameters()} - approximate)
