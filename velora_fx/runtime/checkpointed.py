"""Blocks that recompute in backward, exactly, what they do not keep: torch.utils.checkpoint, whole or selective."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from velora_fx.runtime.notices import Notices
from velora_fx.runtime.region import make_call
from velora_fx.runtime.stand_in import StandIn

aten = torch.ops.aten
Recompute = Literal["pointwise", "all"]
LEVELS: tuple[Recompute, ...] = ("pointwise", "all")
# What is dear to recompute: matrix products, convolutions and attention; norms, activations and dropout are cheap.
COSTLY = (
    aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, aten._grouped_mm,
    aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention, aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_fused_attention_overrideable,
)  # fmt: skip


class Checkpointed(StandIn):
    """The forward of a block under gradient checkpointing.

    "pointwise" keeps the outputs of matrix products and attention and recomputes the rest, "all" keeps the block's
    inputs alone. In `eval()`, under `no_grad` and for a block that checkpoints itself it calls the original forward.
    """

    def __init__(self, name: str, block: torch.nn.Module, recompute: Recompute, notices: Notices) -> None:
        super().__init__(block)
        self.notices = notices
        self.name = name
        self.recompute = recompute
        self.num_calls = self.num_in_effect = 0  # of calls in training that no compiler traced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.removed or not self.block.training or not torch.is_grad_enabled():
            return self.original(*args, **kwargs)
        if not isinstance(self.previous, StandIn):
            self.notices.check_target(self)
        is_told = bool(vars(self.block).get("gradient_checkpointing"))  # by Hugging Face's trainers: it does so itself
        if not torch.compiler.is_compiling():
            self.num_calls += 1
            self.num_in_effect += not is_told
            self.notices.check_checkpoints(self, is_told)
        if is_told:
            return self.original(*args, **kwargs)
        call = make_call(self.block, args, kwargs)  # a cache would be filled twice
        context_fn = CONTEXTS[self.recompute]
        context: dict[str, Any] = {} if context_fn is None else {"context_fn": context_fn}
        return checkpoint(self.original, *call.args, use_reentrant=False, **context, **call.kwargs)


def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Saves what is dear to recompute (https://docs.pytorch.org/docs/stable/checkpoint.html)."""
    packet = getattr(operator, "overloadpacket", operator)
    return CheckpointPolicy.MUST_SAVE if packet in COSTLY else CheckpointPolicy.PREFER_RECOMPUTE


CONTEXTS: Mapping[Recompute, Callable[[], Any] | None] = {
    "pointwise": partial(create_selective_checkpoint_contexts, policy),
    "all": None,
}


def install_checkpointing(
    model: torch.nn.Module, recomputed: Mapping[str, Recompute], notices: Notices
) -> list[Checkpointed]:
    """Has the named blocks recompute in backward."""
    stand_ins = []
    for name, recompute in recomputed.items():
        stand_in = Checkpointed(name, model.get_submodule(name), recompute, notices)
        stand_in.install()
        stand_ins.append(stand_in)
    return stand_ins
