"""Predicted peaks of a step, untouched and with everything compressed, and what the real allocator says of both."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._inductor import config

from tests.helpers.allocator import peak_of
from tests.helpers.gradients import assert_same_gradients, compressed_weights, step
from velora_fx.analyse import Analysis, Sizes, analyse, region_plans
from velora_fx.analyse.candidates import by_consumers
from velora_fx.capture import find_blocks
from velora_fx.choose.search import Search
from velora_fx.options import Options, planning_device
from velora_fx.runtime import Notices, RegionPlan, install
from velora_fx.simulate.compiled.inductor import without_kernels

TOLERANCE = {"eager": 0.02, "inductor": 0.03, "blocks": 0.03}
LossOf = Callable[[Any], Tensor]


def scalar(output: Tensor) -> Tensor:
    """The loss of a model that returns it."""
    return output


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, shared ones once."""
    storages = {id(storage): storage for tensor in tensors for storage in [tensor.untyped_storage()]}
    return sum(storage.nbytes() for storage in storages.values())


@dataclass(frozen=True)
class Prediction:
    """The analysis of a model's step, its peaks, and the same model with everything compressed that can be."""

    analysis: Analysis
    untouched_bytes: int
    compressed_bytes: int
    compressed: nn.Module


def plans_for(analysis: Analysis, sizes: Sizes) -> dict[str, RegionPlan]:
    """What to install for these sub-token sizes of candidates."""
    return region_plans(analysis.findings, by_consumers(analysis.compressible, sizes), analysis.is_factored)


def predict(model: nn.Module, batch: Mapping[str, Any], **options: Any) -> Prediction:
    """Plans for one step of SGD; the model is left as it is."""
    wanted = Options(optimizer="sgd", **options)
    analysis = analyse(model, (), dict(batch), wanted, planning_device(model), lambda text: None)
    actions, peak = Search(analysis, compresses=True, recomputes=False).tightest
    compressed = copy.deepcopy(model)
    install(compressed, plans_for(analysis, actions.sizes), 0, Notices(None))
    return Prediction(analysis, analysis.baseline.peak_bytes, peak.peak_bytes, compressed)


def measured_peak(
    model: nn.Module,
    batch: Mapping[str, Any],
    target: str = "eager",
    loss_of: LossOf = scalar,
    autocast: bool = False,
    accumulates: bool = False,
) -> int:
    """Peak bytes of the second step on the real allocator; with `accumulates` of its second batch.

    `target` "blocks" is the eager model with each of its blocks compiled by itself. Compiled code runs without its
    kernels, which allocate nothing: see `test_inductor`.
    """
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    torch._dynamo.reset()
    run = torch.compile(model, fullgraph=True) if target == "inductor" else model
    for block in find_blocks(model).values() if target == "blocks" else ():
        block.compile(fullgraph=True)

    def backward() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = loss_of(run(**batch))
        loss.backward()

    def whole_step() -> None:
        backward()
        optimizer.step()

    with uncached_without_kernels():
        whole_step()
        optimizer.zero_grad()
        if accumulates:
            backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        before = tensor_bytes([*model.parameters(), *model.buffers(), *gradients, *batch.values()])
        return before + peak_of(whole_step)


@contextlib.contextmanager
def uncached_without_kernels() -> Iterator[None]:
    """Has the compiler write its code anew, and none of its kernels compute."""
    uncached = {"fx_graph_cache": False, "compile_threads": 1}
    with without_kernels(), config.patch(uncached), functorch_config.patch(enable_autograd_cache=False):
        yield


def assert_predicted(
    model: nn.Module, batch: Mapping[str, Any], target: str, loss_of: LossOf = scalar, **options: Any
) -> Prediction:
    """Predicted is measured, untouched and compressed, and compressed is less; numbers stay what they are."""
    how = {"autocast": options.pop("autocast", False), "accumulates": options.get("gradient_accumulation", 1) > 1}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how["autocast"]):
        predicted = predict(model, batch, compiled=target == "inductor", loss_fn=loss_of, **options)
    assert_near(predicted.untouched_bytes, measured_peak(model, batch, target, loss_of, **how), target)
    assert_near(predicted.compressed_bytes, measured_peak(predicted.compressed, batch, target, loss_of, **how), target)
    return predicted


def assert_near(predicted_bytes: int, measured_bytes: int, target: str) -> None:
    """Within the tolerance of the target."""
    error = predicted_bytes / measured_bytes - 1
    assert abs(error) <= TOLERANCE[target], f"predicted {predicted_bytes}, measured {measured_bytes}: {error:+.2%}"


def assert_only_compressed_gradients_differ(
    predicted: Prediction, model: nn.Module, batch: Mapping[str, Any], target: str, loss_of: LossOf = scalar
) -> None:
    """Loss and all gradients are the untouched model's, but for the weights that the plan compresses."""
    compressed, reference = copy.deepcopy(predicted.compressed), copy.deepcopy(model)
    approximate = set(compressed_weights(compressed))
    assert approximate
    torch._dynamo.reset()
    run = torch.compile(compressed, fullgraph=True, backend="aot_eager") if target == "inductor" else compressed
    loss, expected = (loss_of(step(one, batch, loss_of)) for one in (run, reference))
    torch.testing.assert_close(loss, expected)
    names = {name for name, parameter in compressed.named_parameters() if parameter.requires_grad}
    assert_same_gradients(compressed, reference, names - approximate)
    changed = dict(reference.named_parameters())
    own = dict(compressed.named_parameters())
    assert any(not torch.allclose(own[name].grad, changed[name].grad) for name in approximate)  # type: ignore[arg-type]
