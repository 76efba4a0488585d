"""The models of tools/quality, and what a way makes of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import velora_fx
from tools.bench.models import LORA_TARGETS, llama_of_shape
from tools.quality.docstrings import batch_of_labelled, encoder
from tools.quality.moments import BETAS, WEIGHT_DECAY, FoldedAdamW
from tools.quality.ways import Shape, Task, Way

LORA_RANK = 8
# The linears of an encoder by the names that ways have for them; the last are called dense, after their parents.
ENCODER_NAMES = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
DENSE_NAMES = {"intermediate": "up_proj", "output": "down_proj"}


def make_model(task: Task, way: Way, seed: int, device: str, start: Mapping[str, Tensor] | None) -> nn.Module:
    """The model of a task in training mode, in float32: pre-trained, from `start`, or from random weights of the seed.

    The same for every way of a seed but for what is trained: all but `frozen` linears, or adapters alone.
    """
    torch.manual_seed(seed)
    model = encoder(task.model, device) if task.model else _llama(task.shape, device)
    if start is not None:
        model.load_state_dict(dict(start))
    if task.adapter:
        model = _with_lora(model, way, task.shape, seed)
    for name, module in model.named_modules():
        if _way_name(name) in way.frozen:
            module.requires_grad_(False)
    return model.train()


def _llama(shape: Shape, device: str) -> nn.Module:
    sizes = (shape.width, shape.layers, shape.inner, shape.heads, shape.heads, shape.words)
    return llama_of_shape(*sizes, (1, 1), device)[0]


def _with_lora(model: nn.Module, way: Way, shape: Shape, seed: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model  # not installed everywhere

    more: dict[str, Any] = {}
    if way.peft_velora:
        from peft.tuners.lora.config import VeloraConfig

        groups = shape.width // way.peft_velora
        more["velora_config"] = VeloraConfig(num_groups=groups, scale=1.0)
    config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=LORA_TARGETS, **more)
    adapted: Any = get_peft_model(model, config)
    torch.manual_seed(seed)  # PEFT's projections took random numbers too
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name:
            nn.init.kaiming_uniform_(parameter, a=5**0.5)
    return adapted  # type: ignore[no-any-return]


def compress(model: nn.Module, task: Task, way: Way, batch: dict[str, Tensor], seed: int) -> int:
    """Applies the plan that a way stands for, if it stands for one; returns how many weights are compressed.

    On top of velora_fx's own plan, which tells what could be compressed, stands what is, and at which size.
    """
    if way.peft_velora:
        return sum(name.endswith("lora_velora_embed") for name, _ in model.named_modules())
    if not way.is_compressed:
        return 0
    offered = _untouched_plan(task, way.gradients, next(iter(batch.values())).device.type)
    last = task.shape.layers - 1
    decisions = []
    for decision in offered.decisions:
        block = int(decision.region.split(".")[-1])
        if min(block, last - block) < way.spared:
            continue
        by_size: dict[int, list[str]] = {}
        for consumer in decision.consumers:
            if (size := _size_of(consumer, way)) is not None:
                by_size.setdefault(size, []).append(consumer)
        for size, consumers in by_size.items():
            decisions.append(replace(decision, action="compress", sub_token_size=size, consumers=tuple(consumers)))
    if not decisions and not way.spared:
        raise ValueError(f"this way compresses {way.sizes}, and the model has none of these linears")
    plan = replace(offered, decisions=tuple(decisions), projection=way.projection, seed=seed)
    velora_fx.apply(model, plan, batch)
    return sum(len(decision.consumers) for decision in decisions)


def _size_of(linear: str, way: Way) -> int | None:
    """The sub-token size of a linear by its dotted name, in which adapters add parts to the name of their base.

    Of an adapter that is the first matrix, which reads the input of its base, as in PEFT's VeLoRA.
    """
    parts = linear.split(".")
    names = ["lora_B"] if "lora_B" in parts else [*parts, _way_name(linear)]
    return next((way.sizes[name] for name in names if name in way.sizes), None)


def _way_name(linear: str) -> str:
    """The name that ways have for a linear by its dotted name."""
    *_, before, parent, last = ["", "", *linear.split(".")]
    if last == "dense" and before != "attention":  # what reads attention's result is compressed in no way
        return DENSE_NAMES.get(parent, last)
    return ENCODER_NAMES.get(last, last)


@cache
def _untouched_plan(task: Task, gradients: str, device: str) -> velora_fx.Plan:
    """The plan of a step with nothing done about it; `decisions` are what could be compressed."""
    model = make_model(task, Way(), 0, device, None)
    width = task.length + 1 if task.model else task.length
    batch = batch_of(task, torch.zeros(task.texts, width, dtype=torch.int64, device=device))

    def is_in_a_block(module: nn.Module, name: str) -> bool:
        return any(part.isdigit() for part in name.split("."))

    with precision(device):
        return velora_fx.plan(
            model, None, batch, method="compress", compiled=False, gradients=gradients, filter_fn=is_in_a_block
        )


def batch_of(task: Task, ids: Tensor) -> dict[str, Tensor]:
    """The arguments of a step."""
    return batch_of_labelled(ids) if task.model else {"input_ids": ids, "labels": ids}


def precision(device: str) -> torch.autocast:
    """Autocast to bfloat16 on CUDA; none on CPU."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def make_optimizer(model: nn.Module, way: Way, rate: float, seed: int) -> torch.optim.Optimizer:
    """AdamW, or what a way has in its place, for all that is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if way.moments == "velora" or not way.sizes:
        return torch.optim.AdamW(trained, lr=rate, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    sizes = {}
    for name, module in model.named_modules():
        size = _size_of(name, way)
        if isinstance(module, nn.Linear) and size is not None:
            sizes[module.weight] = size
    return FoldedAdamW(trained, rate, sizes, way.moments, seed)
