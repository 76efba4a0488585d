"""What is measured of a training step besides its time: memory, and the errors of gradients."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import velora_fx
from tools.accuracy.measure import peak_on_cpu


def compressed_weights(model: nn.Module, plan: velora_fx.Plan | None) -> set[str]:
    """The names of the parameters whose gradients are approximate, also of PEFT's VeLoRA."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    consumers = [c.split("#")[0] for decision in (plan.compressed if plan else ()) for c in decision.consumers]
    found = {name if name in names else f"{name}.weight" for name in consumers}
    by_peft = [name for name, _ in model.named_modules() if name.endswith("lora_velora_embed")]
    prefixes = tuple(name.removesuffix("lora_velora_embed") + "lora_A." for name in by_peft)
    return found | {name for name in names if prefixes and name.startswith(prefixes)}


def gradient_errors(
    model: nn.Module, reference: Mapping[str, Tensor], compressed: set[str]
) -> tuple[float | None, float]:
    """The relative error of the compressed weights' gradients together, None without any, and the largest of others."""
    differences, norms, others = 0.0, 0.0, [0.0]
    total = math.sqrt(sum(float(grad.float().norm()) ** 2 for grad in reference.values()))
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None or name not in reference:
            raise RuntimeError(f"{name} has no gradient in one of the two models")
        truth = reference[name].to(parameter.device).float()
        difference, norm = float((parameter.grad.float() - truth).norm()), float(truth.norm())
        if name in compressed:
            differences, norms = differences + difference**2, norms + norm**2
        else:  # a gradient that is zero in truth has no relative error
            others.append(difference / max(norm, 1e-3 * total))
    largest = torch.tensor(others, dtype=torch.float64).max()  # NaN if there is one
    return math.sqrt(differences / norms) if norms else None, float(largest)


def peak_of(step: Callable[[], None], held: list[Tensor], device: str) -> int:
    """The most bytes of tensors during a step."""
    if device == "cpu":
        return peak_on_cpu(step, held)
    free(device)
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def held_bytes(forward: Callable[[], Tensor], device: str) -> int:
    """The bytes that a forward pass leaves behind while its loss is alive."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        loss = forward()
        after = torch.cuda.memory_allocated()
        del loss
        return after - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports its start and end on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = forward()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    del loss
    return sum(int(e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")


def free(device: str) -> None:
    """Gives back what is not in use."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
