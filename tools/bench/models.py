"""The models that tools/bench trains, and what of them is compressed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tools.accuracy.models import hugging_face
from velora_fx.cli.presets import PRESETS

SIZES: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 3,
    "num_attention_heads": 12,
}  # fmt: skip
TINY: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tiny": ("LlamaForCausalLM", TINY),
    "llama-cpu": ("LlamaForCausalLM", SIZES),
    **{name: (architecture, sizes) for name, (_, architecture, sizes) in PRESETS.items()},
}
# The ends of names, as transformers has them: of Llama, of ViT since 5.20, and of ViT before.
VALUES_AND_DOWN = ("v_proj", "down_proj", "mlp.fc2", "attention.value")
LORA_RANK = 16
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_model(name: str, adapter: str, device: str, dtype: torch.dtype, sub_token_size: int) -> nn.Module:
    """A model in training mode, the same each time; `adapter` is "", "lora" or "peft-velora"."""
    architecture, sizes = MODELS[name]
    with torch.device(device):
        torch.manual_seed(0)
        model = hugging_face(architecture, **sizes, attn_implementation="sdpa")
        config: Any = model.config
        config.use_cache = False
        model = with_adapter(model, adapter, sub_token_size) if adapter else model
    return model.to(device, dtype).train()


def with_adapter(model: nn.Module, adapter: str, sub_token_size: int) -> nn.Module:
    """The model with PEFT's LoRA, whose matrices B are not zero: else those of A would have no gradient at first.

    PEFT's VeLoRA takes one number of groups for all linears, so the wide ones get larger sub-tokens (down_proj of
    Llama about 2.7 times as large).
    """
    from peft import LoraConfig, get_peft_model  # not installed everywhere

    config: Any = model.config
    more: dict[str, Any] = {}
    if adapter == "peft-velora":
        from peft.tuners.lora.config import VeloraConfig

        groups = config.hidden_size // sub_token_size
        more["velora_config"] = VeloraConfig(num_groups=groups, scale=1.0, init_type="random")
    lora = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, lora_dropout=0.0, target_modules=LORA_TARGETS, **more)
    adapted: Any = get_peft_model(model, lora)
    torch.manual_seed(1)  # PEFT's projections took random numbers too
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
    return adapted  # type: ignore[no-any-return]


def nearest_divisor(width: int, wanted: int) -> int:
    """The divisor of a width that is nearest to the wanted size, the smaller of two."""
    divisors = [size for size in range(2, width + 1) if width % size == 0]
    return min(divisors, key=lambda size: (abs(size - wanted), size))


def sub_token_sizes(model: nn.Module, wanted: int) -> tuple[int, ...]:
    """The sizes nearest to the wanted one, for every width of linear inputs above it; narrower ones stay exact."""
    widths = {module.in_features for module in model.modules() if isinstance(module, nn.Linear)}
    return tuple(sorted({nearest_divisor(width, wanted) for width in widths if width > wanted}))


def compressible(what: str) -> Callable[[nn.Module, str], bool] | None:
    """Which weights may be compressed: "v+down" as the paper does, or "all" that velora_fx takes by default."""
    if what == "all":
        return None

    def is_value_or_down(module: nn.Module, name: str) -> bool:
        is_second = name.endswith("output.dense") and not name.endswith("attention.output.dense")
        return is_second or name.endswith(VALUES_AND_DOWN)

    return is_value_or_down


def tokens_of(batch: dict[str, Tensor], model: nn.Module) -> int:
    """Tokens of a batch, or patches of its images with the class token."""
    if "input_ids" in batch:
        return batch["input_ids"].numel()
    config: Any = model.config
    patches: int = (config.image_size // config.patch_size) ** 2
    return len(batch["pixel_values"]) * (patches + 1)


def llama_of_shape(
    width: int, layers: int, inner: int, heads: int, key_heads: int, words: int, shape: tuple[int, int], device: str
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A Llama of these sizes in training mode, and a batch of this shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=words, use_cache=False,
    )  # fmt: skip
    with torch.device(device):
        model = LlamaForCausalLM(config).train()
        ids = torch.zeros(shape, dtype=torch.int64)
    return model, {"input_ids": ids, "labels": ids}
