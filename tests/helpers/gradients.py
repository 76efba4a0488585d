"""What gradients are compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import velora_fx
from velora_fx.analyse import analyse
from velora_fx.capture import example_call
from velora_fx.choose.search import Search
from velora_fx.choose.write_plan import write_plan
from velora_fx.options import Options, planning_device
from velora_fx.runtime import Region
from velora_fx.session import with_compiled


def tightest(model: nn.Module, example_inputs: Any, **options: Any) -> velora_fx.Plan:
    """The plan that compresses everything that can be compressed, as a budget of one byte would have it, without the
    search for what else would; of a step without an optimizer, which is planned more quickly, unless one is named."""
    args, kwargs = example_call(example_inputs)
    device = planning_device(model, options.pop("device", None))
    wanted = with_compiled(Options(**{"optimizer": "none", "method": "compress", **options}), model)
    analysis = analyse(model, args, kwargs, wanted, device, lambda text: None)
    search = Search(analysis, wanted.compresses, wanted.recomputes)
    return write_plan(analysis, search.problem, *search.tightest, None, 1, type(model).__name__, wanted)


def regions_of(model: nn.Module) -> list[Region]:
    """The regions that `optimize` installed."""
    return [forward for module in model.modules() if isinstance(forward := vars(module).get("forward"), Region)]


def step(model: nn.Module, batch: Mapping[str, Any], loss_of: Callable[[Any], Tensor], seed: int = 7) -> Any:
    """Forward and backward from a fixed random state; returns the model's output."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    output = model(**batch)
    loss_of(output).backward()
    return output


def saved_by(run: Callable[[], object]) -> list[Tensor]:
    """The tensors that autograd saves while it runs, held, so that no address is used twice."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        run()
    return saved


def assert_same_gradients(model: nn.Module, reference: nn.Module, names: set[str] | None = None) -> None:
    """||a - b|| <= 1e-5 max(||b||, 1e-3 ||all gradients||) for the named parameters (all by default); None is None."""
    expected = {name: p.grad for name, p in reference.named_parameters()}
    total = torch.stack([g.double().norm() for g in expected.values() if g is not None]).norm()
    for name, parameter in model.named_parameters():
        if names is not None and name not in names:
            continue
        reference_grad = expected[name]
        assert (parameter.grad is None) == (reference_grad is None), f"{name}: one gradient is None"
        if parameter.grad is None or reference_grad is None:
            continue
        error = (parameter.grad.double() - reference_grad.double()).norm()
        assert error <= 1e-5 * max(reference_grad.double().norm(), 1e-3 * total), f"{name}: error {error:.3g}"


def compressed_weights(model: nn.Module) -> dict[str, Tensor]:
    """The projection of each weight whose gradient is approximate, by the parameter's name (first use)."""
    names = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    for region in regions_of(model):
        for consumer, choice in region.choices.items():
            full = ".".join(part for part in (region.name, consumer.split("#")[0]) if part)
            found[full if full in names else f"{full}.weight"] = region.projections[choice.tensor]
    return found


@contextlib.contextmanager
def rebuilt_inputs(model: nn.Module, projections: Mapping[str, Tensor]) -> Iterator[None]:
    """The paper's VeLoRA by other means: products of the named weights take dW = dYᵀ x̂, x̂ rebuilt, all in float64."""
    named = dict(model.named_parameters(remove_duplicate=False))
    by_id = {id(named[name]): v for name, v in projections.items()}
    linear, addmm = F.linear, torch.addmm

    def rebuilt_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if id(weight) not in by_id:
            return linear(x, weight, bias)
        return _RebuiltLinear.apply(x, weight, bias, by_id[id(weight)])  # type: ignore[no-any-return]

    def rebuilt_addmm(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        if id(weight) not in by_id:
            return addmm(bias, x, weight)
        return _RebuiltLinear.apply(x, weight.t(), bias, by_id[id(weight)])  # type: ignore[no-any-return]

    with mock.patch.object(F, "linear", rebuilt_linear), mock.patch.object(torch, "addmm", rebuilt_addmm):
        yield


class _RebuiltLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, v: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, v)
        ctx.has_bias = bias is not None
        return torch._C._nn.linear(x, weight, bias)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, v = ctx.saved_tensors
        groups = x.double().reshape(-1, *v.shape)
        x_hat = ((groups * v.double()).sum(-1, keepdim=True) * v.double()).reshape(-1, x.shape[-1])
        dy64 = dy.double().reshape(-1, dy.shape[-1])
        dx = (dy64 @ weight.double()).reshape(x.shape).to(x.dtype)
        db = dy64.sum(0).to(dy.dtype) if ctx.has_bias else None
        return dx, (dy64.t() @ x_hat).to(weight.dtype), db, None
