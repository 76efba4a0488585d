"""What compiled graphs keep, in the terms of the model's products."""

from __future__ import annotations

import torch

from velora_fx.analyse import Findings
from velora_fx.analyse.trial.compiler_saves import KeptTensors
from velora_fx.analyse.trial.probe import Use
from velora_fx.passes.kept_for_backward import Kept
from velora_fx.simulate import Tracker

USES = {
    ("blocks.0", "up"): Use("blocks.0", "up", "up.weight", "blocks.0.up.weight", None),
    ("blocks.0", "down"): Use("blocks.0", "down", "down.weight", "blocks.0.down.weight", None),
}
STATE = {0: "blocks.0.up.weight", 1: "blocks.0.down.weight", 2: "blocks.0.norm.weight"}


def observed(tensor: torch.Tensor, kept: Kept, tracker: Tracker | None = None) -> KeptTensors:
    """What is collected of one tensor that a graph of the first block keeps."""
    found = KeptTensors(Findings(uses=dict(USES)), tracker or Tracker())
    found.observer_of(STATE)({"x": tensor}, {"x": kept})
    return found


def test_a_tensor_kept_for_the_gradients_of_weights_is_saved_by_their_linears() -> None:
    tensor = torch.zeros(6, 8)
    found = observed(tensor, Kept(((0, 6, 8), (1, 6, 8)), ()))
    assert [(s.region, s.consumer, s.x, s.shape) for s in found.savings] == [
        ("blocks.0", "up", "x", (6, 8)),
        ("blocks.0", "down", "x", (6, 8)),
    ]
    assert {saving.num_bytes for saving in found.savings} == {6 * 8 * 4}


def test_a_tensor_that_is_kept_transposed_has_the_shape_of_the_input() -> None:
    (saving,) = observed(torch.zeros(8, 6), Kept(((0, 6, 8),), ())).savings
    assert saving.shape == (6, 8)


def test_a_tensor_that_is_kept_padded_has_the_shape_of_the_input() -> None:
    (saving,) = observed(torch.zeros(8, 12), Kept(((0, 6, 9),), ())).savings
    assert (saving.shape, saving.num_bytes) == ((6, 9), 8 * 12 * 4)


def test_operations_and_products_with_other_tensors_are_named_and_compress_nothing() -> None:
    found = observed(torch.zeros(6, 8), Kept(((2, 6, 8),), ("mul", "_flash_attention_backward")))
    assert [saving.operation for saving in found.savings] == [
        "mul", "attention", "a product with another activation",
    ]  # fmt: skip
    assert not any(saving.consumer for saving in found.savings)


def test_a_tensor_without_a_use_is_kept_by_the_compiled_backward() -> None:
    (saving,) = observed(torch.zeros(6, 8), Kept((), ())).savings
    assert saving.operation == "the compiled backward"


def test_parameters_are_no_saved_tensors() -> None:
    tensor, tracker = torch.zeros(8, 8), Tracker()
    tracker.watch(tensor, "parameters")
    found = observed(tensor, Kept((), ("mm",)), tracker)
    assert not found.savings and not found.last_uses


def test_a_compiled_forward_is_the_last_use_of_what_it_keeps() -> None:
    tensor, tracker = torch.zeros(8, 8), Tracker()
    found = observed(tensor, Kept(((0, 6, 8),), ()), tracker)
    assert found.last_uses == {tracker.watch(tensor): tracker.now}
