"""Are the operators right on this very device? Asked before anything is timed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tools.accuracy.models import batch_of
from tools.bench.models import make_model
from tools.bench.ops import KEPT, OpCase, fused_contenders, projection_of, torch_dtype
from tools.bench.train import TrainRow, Way, optimizer_of, plan_for, prepare
from velora_fx.ops import fold
from velora_fx.ops import velora as ops
from velora_fx.runtime import Region

ROWS = 515  # no multiple of what kernels take at once
FLOAT_BOUND = 1e-5


def operator_complaints(cases: Sequence[OpCase], device: str) -> list[str]:
    """What is wrong with compress, expand, fold and dW at these sizes, held against float64; nothing if all is well."""
    found = []
    for case in cases:
        eps = torch.finfo(torch_dtype(case.dtype)).eps
        for operator, ours, truth in _operators(case, device):
            bound = max(FLOAT_BOUND, 2 * eps if operator.startswith(("fold", "dW")) else eps)  # those are rounded twice
            found += error_complaints(f"{operator} {case}", ours, truth, bound)
    return found


def error_complaints(what: str, ours: Tensor, truth: Tensor, bound: float) -> list[str]:
    """A complaint where the relative error is above the bound or is no number."""
    error = relative_error(ours, truth)
    return [] if error <= bound else [f"{what}: relative error {error:.2g}, allowed {bound:.2g}"]


def relative_error(ours: Tensor, truth: Tensor) -> float:
    """The larger of the errors in norm and of the worst entry, relative to the norm and to the largest entry."""
    difference, truth = ours.double() - truth.double(), truth.double()
    worst = difference.abs().max() / truth.abs().max()
    return float(torch.maximum(difference.norm() / truth.norm(), worst))


def _operators(case: OpCase, device: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The name, the result and the float64 truth of each operator."""
    v, dtype = projection_of(case, device), torch_dtype(case.dtype)
    generator = torch.Generator(device).manual_seed(0)
    x, dy = (torch.randn(ROWS, size, generator=generator, device=device).to(dtype) for size in (case.width, case.out))
    z = ops.compress(x, v)
    yield "compress", z, (x.double().view(ROWS, *v.shape) * v.double()).sum(-1)
    factor = dy.t() @ z
    truth = (factor.double().unsqueeze(-1) * v.double()).flatten(1)
    yield "expand", ops.expand(factor, v, False), truth
    yield "expand, transposed,", ops.expand(factor, v, True), truth
    weight, carrier = torch.randn(factor.shape[0], case.width, generator=generator, device=device).to(dtype), factor
    truth = KEPT * weight.double() + (carrier.double().unsqueeze(-1) * v.double().sign()).flatten(1)
    fold([weight], [carrier], [v], torch.tensor(KEPT, dtype=torch.float64))
    yield "fold", weight, truth
    weight = torch.zeros(case.out, case.width, dtype=dtype, device=device, requires_grad=True)
    ops.linear(x, weight, None, z, v, None).backward(dy)  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    truth = ((dy.double().t() @ z.double()).unsqueeze(-1) * v.double()).flatten(1)
    yield "dW", weight.grad, truth
    for cut, contender in fused_contenders(device).items():
        yield f"dW, fused by {cut},", contender(dy, z, v), truth


def fold_complaints(device: str) -> list[str]:
    """What is wrong with spreading factored updates over weights in both layouts, held against float64."""
    found = []
    generator = torch.Generator(device).manual_seed(0)
    keep = torch.tensor(0.75, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        for is_transposed in (False, True):
            weight, carrier, v = (
                torch.randn(*size, generator=generator, device=device).to(dtype)
                for size in ((ROWS, 96), (ROWS, 12), (12, 8))
            )
            weight = weight.t().contiguous().t() if is_transposed else weight
            truth = weight.double() * 0.75 + (carrier.double().unsqueeze(-1) * v.double().sign()).flatten(1)
            fold([weight], [carrier], [v], keep)
            what = f"fold, {dtype}, {'transposed' if is_transposed else 'as is'}"
            found += error_complaints(what, weight, truth, max(FLOAT_BOUND, 2 * torch.finfo(dtype).eps))
            if carrier.any():
                found.append(f"{what}: the carrier is not zero afterwards")
    return found


def tiny_models(device: str, adapter: str) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """An untouched tiny Llama, an equal one that is compressed as the rows that are timed are, and a batch."""
    row = TrainRow("llama-tiny", "numerics", Way(adapter=adapter, compresses="all"), device, 4, 64, 16, 1)
    dense, model = (make_model(row.model, adapter, device, row.dtype, row.sub_token_size) for _ in range(2))
    batch = batch_of(dense, row.batch_size, row.length)
    optimizer = optimizer_of(model, row)
    # By the rates of a CPU: so small a model is no faster compressed on a GPU.
    prepare(model, optimizer, batch, row, plan_for(model, optimizer, batch, row, "cpu"))
    return dense, model, batch


def training_complaints(dense: nn.Module, model: nn.Module, batch: dict[str, Tensor]) -> list[str]:
    """What is wrong with a step of `tiny_models`, held against the untouched one with x̂ rebuilt in float64.

    The loss and every gradient of what is not compressed must be those of the untouched model.
    """
    projections = projections_of(model)
    linears = {f"{name}.weight": module for name, module in dense.named_modules() if isinstance(module, nn.Linear)}
    seen: dict[str, list[Tensor]] = {}
    for name in projections:
        seen[name] = []
        linears[name].register_full_backward_hook(_keeps(seen[name]))
        linears[name].register_forward_pre_hook(lambda _, args, kept=seen[name]: kept.append(args[0].detach()))
    losses = [one(**batch).loss for one in (dense, model)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook")  # below frozen weights no input has a gradient
        for loss in losses:
            loss.backward()
    return list(_training_complaints([loss.detach() for loss in losses], dense, model, projections, seen))


def _keeps(kept: list[Tensor]) -> Any:
    def hook(_: nn.Module, grad_input: Any, grad_output: tuple[Tensor, ...]) -> None:
        kept.append(grad_output[0])

    return hook


def _training_complaints(
    losses: list[Tensor],
    dense: nn.Module,
    model: nn.Module,
    projections: dict[str, Tensor],
    seen: dict[str, list[Tensor]],
) -> Iterator[str]:
    eps = torch.finfo(next(dense.parameters()).dtype).eps
    bound, loss_bound = max(FLOAT_BOUND, 4 * eps), max(1e-6, eps / 4)
    if not projections:
        yield "nothing of a tiny Llama was compressed"
    if not abs(float(losses[0] - losses[1])) <= loss_bound * abs(float(losses[0])):
        yield f"the loss of a tiny Llama is {float(losses[1])!r} compressed and {float(losses[0])!r} untouched"
    expected = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        truth, grad = expected[name].grad, parameter.grad
        if not parameter.requires_grad:
            continue
        if truth is None or grad is None:
            yield f"{name} of a tiny Llama has no gradient"
            continue
        if name in projections:
            x, dy = seen[name]
            truth = _with_rebuilt_input(x, dy, projections[name].to(x.device))
        kind = "compressed" if name in projections else "exact"
        yield from error_complaints(f"{kind} gradient of {name} of a tiny Llama", grad, truth, bound)


def _with_rebuilt_input(x: Tensor, dy: Tensor, v: Tensor) -> Tensor:
    groups = x.double().reshape(-1, *v.shape)
    rebuilt = ((groups * v.double()).sum(-1, keepdim=True) * v.double()).flatten(1)
    return dy.double().reshape(-1, dy.shape[-1]).t() @ rebuilt


def projections_of(model: nn.Module) -> dict[str, Tensor]:
    """The projection of every weight whose gradient is approximate, by the parameter's name."""
    found = {}
    for region in (vars(module).get("forward") for module in model.modules()):
        if isinstance(region, Region):
            for consumer, choice in region.choices.items():
                found[f"{region.name}.{consumer.split('#')[0]}.weight"] = region.projections[choice.tensor]
    return found
