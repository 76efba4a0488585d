"""A model's forward as compiled graphs: which there are, and what comes out."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.padding import padded_products
from tests.helpers.peaks import assert_near, assert_predicted, measured_peak, predict
from tests.helpers.toys import Stack, rows, stack, without_dropout
from tests.helpers.zoo import loss_of
from velora_fx.analyse import Actions
from velora_fx.analyse.trial import probe
from velora_fx.devices import device_rates
from velora_fx.simulate import StepTimer, Tracker, fake_copy, fake_mode, simulate_forward
from velora_fx.simulate.compiled import Apart, Inductor, all_calls, compiled_forward, inner_calls, unobserved
from velora_fx.simulate.compiled.program import CompiledForward

CPU = torch.device("cpu")


def compiled(model: nn.Module, apart: Apart = inner_calls) -> tuple[CompiledForward, Tensor]:
    """The compiled forward of a fake copy, and a fake input for it."""
    mode = fake_mode()

    def traced(fake: nn.Module, _: Tracker) -> None:
        simulate_forward(fake, *fake_copy(((rows(),), {}), mode, CPU, real="none"), CPU)

    findings = probe(fake_copy(model, mode, CPU, "none"), traced, Tracker(), lambda text: None)
    fake, x = fake_copy(model, mode, CPU, "none"), fake_copy(rows(), mode, CPU, "none")
    inductor = Inductor(CPU, StepTimer(device_rates(CPU)))
    made = compiled_forward(
        fake, (x,), {}, findings.graphs, inductor, unobserved, lambda name: contextlib.nullcontext(), apart
    )
    return made, x


def names(forward: CompiledForward) -> list[str]:
    return [step.name for step in forward.program.steps]


def test_few_blocks_are_one_graph_with_what_surrounds_them() -> None:
    assert names(compiled(stack(num_blocks=8))[0]) == [""]


def test_of_many_blocks_the_inner_ones_are_compiled_apart_and_once() -> None:
    forward, x = compiled(stack(num_blocks=13))
    assert names(forward) == ["", *(f"blocks.{number}" for number in range(1, 12)), ""]
    forward(x).backward()
    assert len(forward.inductor.compiled) == 3
    assert all(parameter.grad is not None for parameter in forward.model.parameters())


def test_by_blocks_each_one_is_apart() -> None:
    assert names(compiled(stack(num_blocks=2), apart=all_calls)[0]) == ["blocks.0", "blocks.1", ""]


@dataclass
class Result:
    loss: Tensor
    rows: int


class Recording(Stack):
    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None) -> Any:
        return Result(super().forward(x), len(x))


def test_a_result_that_is_a_dataclass_of_the_models_own_is_one_again() -> None:
    torch.manual_seed(0)
    forward, x = compiled(Recording(2).train())
    result = forward(x)
    assert isinstance(result, Result) and result.rows == len(x)
    result.loss.backward()
    assert all(parameter.grad is not None for parameter in forward.model.parameters())


class Returning(Stack):
    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None) -> Any:
        return {"loss": super().forward(x), "rows": len(x), "inner": (x * 2, None)}


def test_the_result_has_the_models_structure() -> None:
    torch.manual_seed(0)
    forward, x = compiled(Returning(2).train())
    result = forward(x)
    assert list(result) == ["loss", "rows", "inner"]
    assert result["loss"].shape == () and result["rows"] == len(x)
    assert result["inner"][0].shape == x.shape and result["inner"][1] is None


class Odd(Stack):
    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None) -> Any:
        if self.norm_of(x) > 0:
            return super().forward(x)
        return x

    def norm_of(self, x: Tensor) -> float:
        return float(x.norm())


def test_a_model_that_branches_on_an_activation_is_refused_with_the_place() -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"its forward asks for some.*test_program\.py.*float\(x\.norm\(\)\)"):
        predict(Odd(2).train(), {"x": rows()}, compiled=True)


class Hooking(Stack):
    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None) -> Any:
        x = x * 2
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient)
        return super().forward(x)


def test_a_model_that_cannot_be_traced_as_a_whole_is_refused_with_the_way_out() -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"cannot be traced as a whole .*register_hook.*: use compiled=False"):
        predict(Hooking(2).train(), {"x": rows().requires_grad_()}, compiled=True)


class Unusual(Stack):
    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None) -> Any:
        return {"loss": super().forward(x), "generator": torch.Generator()}


def test_a_model_that_returns_something_unusual_is_refused_with_the_way_out() -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"returns a Generator: return .* or use compiled=False"):
        compiled(Unusual(2).train())


@pytest.mark.slow
def test_a_deep_models_peak_is_the_real_allocators() -> None:
    model = without_dropout(stack(num_blocks=7))
    batch = {"x": rows(16, 64)}
    predicted = predict(model, batch, compiled=True)
    # Between the inner blocks nothing is fused; beyond them Inductor lets the sums of a few blocks wait.
    assert abs(predicted.untouched_bytes / measured_peak(model, batch, "inductor") - 1) < 0.05


@pytest.mark.slow
def test_a_mask_that_all_attentions_use_is_made_and_kept_once() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 10}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "use_cache": False}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).train()
    ids = torch.randint(64, (8, 256))
    batch = {"input_ids": ids, "labels": ids}
    predicted = predict(model, batch, compiled=True, loss_fn=loss_of)
    assert_near(predicted.untouched_bytes, measured_peak(model, batch, "inductor", loss_of), "inductor")
    first_half = {c.key: 2 for c in predicted.analysis.candidates if c.region < "model.layers.5"}
    for timeline in (predicted.analysis.untouched, predicted.analysis.simulate(Actions(first_half))):
        at_peak = timeline.live(int(timeline.live_bytes.argmax()))
        masks = [size for s, size in at_peak.items() if "[8, 1, 256, 256] float32" in timeline.labels[s].tensor]
        assert masks == [8 * 256 * 256 * 4]


@pytest.mark.slow
def test_the_compilers_padding_of_products_hides_no_input() -> None:
    """As on a GPU, where widths and rows that are odd are padded."""
    model, batch = without_dropout(stack(num_blocks=2, width=33)), {"x": rows(63, 9, 33)}
    plain = predict(model, batch, compiled=True).analysis
    with padded_products():
        padded = assert_predicted(model, batch, "inductor").analysis
    shapes = [[(c.consumers, [s.shape for s in c.savings]) for c in a.candidates] for a in (plain, padded)]
    assert shapes[0] == shapes[1]
    assert [c.bytes_before for c in plain.candidates] == [4 * 567 * width for width in (33, 66, 33, 66, 33)]
    assert [c.bytes_before for c in padded.candidates] == [4 * 568 * width for width in (36, 68, 36, 68, 36)]
