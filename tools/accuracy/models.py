"""The models that tools/accuracy measures: on CPU small ones whose activations dominate, on GPUs real shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from velora_fx.cli.presets import PRESETS

VOCAB, CLASSES, WIDTH = 1024, 10, 256
FIRST_WORD = 4  # the ids below it are special tokens


@dataclass(frozen=True)
class Case:
    """A model and the size of its batch; `length` is that of its texts, None where the config fixes the size."""

    make: Callable[[], nn.Module]
    batch_size: int
    length: int | None = None


def batch_of(model: nn.Module, batch_size: int, length: int | None) -> dict[str, Tensor]:
    """A random batch with labels, the same each time, on the model's device and in its dtype.

    For a model on the meta device integers are on the CPU: planning reads their values.
    """
    first = next(model.parameters())
    config: Any = getattr(model, "config", None)
    main_input = getattr(model, "main_input_name", "input_ids")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        words = torch.randint(FIRST_WORD, config.vocab_size, (batch_size, length)) if length else None
        classes = torch.randint(getattr(config, "num_labels", CLASSES), (batch_size,))
        inputs = words
        if main_input == "pixel_values":
            inputs = torch.randn(batch_size, 3, config.image_size, config.image_size)
        elif main_input == "input_features":
            inputs = torch.randn(batch_size, config.num_mel_bins, 2 * config.max_source_positions)
    assert inputs is not None
    labels = classes if words is None or "Classif" in type(model).__name__ else words
    inputs = inputs.to(first.dtype) if inputs.is_floating_point() else inputs
    words_device = "cpu" if first.is_meta else first.device
    inputs = inputs.to(first.device if inputs.is_floating_point() else words_device)
    return {main_input: inputs, "labels": labels.to(words_device)}


def hugging_face(architecture: str, **sizes: Any) -> nn.Module:
    """A model of transformers with random weights."""
    import transformers  # what needs no such model works without the package

    model_class: Any = getattr(transformers, architecture)
    made = model_class(model_class.config_class(**sizes))
    made.loss_type = made.loss_type or "ForCausalLM"  # GPT-2 names none, warns, and torch.compile refuses the warning
    return made  # type: ignore[no-any-return]


def lora(architecture: str, **sizes: Any) -> nn.Module:
    """The same with adapters of PEFT, which alone are trained."""
    from peft import LoraConfig, get_peft_model  # seconds to import, so only where it is wanted

    targets = ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(r=8, target_modules=targets, lora_dropout=0.1, task_type="CAUSAL_LM")
    adapted: nn.Module = get_peft_model(hugging_face(architecture, **sizes), config)
    return adapted


class EncoderClassifier(nn.Module):
    """PyTorch's own transformer encoder; returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=VOCAB, num_labels=CLASSES)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, nhead=8, dim_feedforward=4 * WIDTH, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=3)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.encoder(self.embed(input_ids))[:, 0]), labels)


class MLPClassifier(nn.Module):
    """An MLP over pixels; returns the loss."""

    main_input_name = "pixel_values"

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_size=16, num_labels=CLASSES)
        hidden = [layer for width in (768, 384, 384) for layer in (nn.Linear(width, 384), nn.GELU())]
        self.layers = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(384, CLASSES))

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.layers(pixel_values), labels)


DECODER: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 688, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
}  # fmt: skip
ENCODER: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_labels": CLASSES,
}  # fmt: skip
DEEP: dict[str, Any] = {"num_hidden_layers": 6}  # enough for planning to compile equal blocks once for several
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
GEMMA: dict[str, Any] = {"sliding_window": 64, "sliding_window_pattern": 3, "query_pre_attn_scalar": 32}
GPT2: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": 3, "n_head": 4}
VIT: dict[str, Any] = {**ENCODER, "image_size": 128, "patch_size": 8}
SWIN: dict[str, Any] = {
    "embed_dim": 64, "depths": [2, 2], "num_heads": [2, 4], "window_size": 8, "image_size": 128, "num_labels": CLASSES,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 32, "d_ff": 4 * WIDTH, "num_layers": 2, "num_heads": 8,
}  # fmt: skip
WHISPER: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": WIDTH, "num_mel_bins": 80, "max_source_positions": 256,
    "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 4 * WIDTH,
    "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 4 * WIDTH,
}  # fmt: skip

CPU_CASES: Mapping[str, Case] = {
    "llama": Case(partial(hugging_face, "LlamaForCausalLM", **DECODER | DEEP), 8, 256),
    "qwen3": Case(partial(hugging_face, "Qwen3ForCausalLM", **DECODER), 8, 256),
    "gemma3": Case(partial(hugging_face, "Gemma3ForCausalLM", **DECODER, **GEMMA), 8, 256),
    "gpt2": Case(partial(hugging_face, "GPT2LMHeadModel", **GPT2, bos_token_id=1, eos_token_id=2), 8, 256),
    "bert": Case(partial(hugging_face, "BertForSequenceClassification", **ENCODER | DEEP), 8, 256),
    "roberta": Case(partial(hugging_face, "RobertaForSequenceClassification", **ENCODER), 8, 256),
    "vit": Case(partial(hugging_face, "ViTForImageClassification", **VIT), 8),
    "swin": Case(partial(hugging_face, "SwinForImageClassification", **SWIN), 8),
    "t5": Case(partial(hugging_face, "T5ForConditionalGeneration", **T5, decoder_start_token_id=0), 8, 192),
    "whisper": Case(partial(hugging_face, "WhisperForConditionalGeneration", **WHISPER, **SPECIAL), 8, 128),
    "mixtral": Case(partial(hugging_face, "MixtralForCausalLM", **DECODER, num_local_experts=4), 8, 256),
    "llama-lora": Case(partial(lora, "LlamaForCausalLM", **DECODER), 8, 256),
    "torch-encoder": Case(EncoderClassifier, 8, 256),
    "mlp": Case(MLPClassifier, 4096),
}


def preset(name: str, make: Callable[..., nn.Module] = hugging_face) -> nn.Module:
    """A model of a preset's shape with random weights."""
    _, architecture, sizes = PRESETS[name]
    return make(architecture, **sizes)


# Untouched eager steps in bfloat16 with AdamW: as few GiB as leave the peak to the backward pass, and about 60 GiB. The
# most telling first: in this order they are measured.
CUDA_CASES: Mapping[str, Case] = {
    "llama-1b": Case(partial(preset, "llama-1b"), 4, 1024),
    "llama-350m": Case(partial(preset, "llama-350m"), 4, 1024),
    "vit-b": Case(partial(preset, "vit-b-16"), 64),
    "llama-1b-lora": Case(partial(preset, "llama-1b", lora), 4, 1024),
    "llama-1b-60g": Case(partial(preset, "llama-1b"), 10, 2048),
    "llama-350m-60g": Case(partial(preset, "llama-350m"), 20, 2048),
    "vit-b-60g": Case(partial(preset, "vit-b-16"), 1024),
}
CASES: Mapping[str, Mapping[str, Case]] = {"cpu": CPU_CASES, "cuda": CUDA_CASES}
