"""Tiny versions of the models the library is for: built from configs, in training mode, with the models' own defaults.

Only sizes are scaled down (windows too, so that Gemma 3 and Swin keep both their kinds of layer), and the ids of
special tokens moved into the small vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

VOCAB = 96
FIRST_WORD = 4  # random tokens start here: the ids below are special ones (RoBERTa pads with 1, all others with 0)
IGNORED = -100  # a label that the losses skip
CLASSES = 3
IMAGE = 32
AUDIO_FRAMES = 48  # Whisper takes no other length
MELS = 8

Kwargs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One model, its batches and its repeated block.

    `block` names the repeated blocks, `{}` standing for an index; where it is None nothing repeats, and the two counts
    are the whole model's. `linears_per_block` counts the products of an activation with one 2-D weight, whatever module
    holds the weight; at least `compressible` of them read an activation that is saved for weight gradients alone.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int, bool], Kwargs]
    shapes: tuple[tuple[int, int], tuple[int, int]]  # (batch_size, length); an image's length is its side
    block: str | None
    linears_per_block: int
    compressible: int
    paddable: bool = True

    def build(self) -> nn.Module:
        """Return the model, the same at every call, in training mode."""
        torch.manual_seed(0)
        return self.make().train()

    def batch(self, batch_size: int, length: int, seed: int = 0, padded: bool = False) -> Kwargs:
        """Return keyword arguments of the model; `padded` cuts every row but the first short on its right."""
        if padded and not self.paddable:
            raise ValueError(f"{self.name} takes no attention mask, so padded=True has no meaning for it")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.inputs(batch_size, length, padded)

    def blocks(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the repeated blocks of `model` by name; none where nothing repeats."""
        pattern = re.escape(self.block or "").replace(r"\{\}", r"\d+")
        return {name: module for name, module in model.named_modules() if name and re.fullmatch(pattern, name)}

    def __str__(self) -> str:
        return self.name


def loss_of(output: Any) -> Tensor:
    """Return the scalar to call backward on: the model's own loss, or the mean square where it returns a tensor."""
    loss: Tensor = output.square().mean() if isinstance(output, Tensor) else output.loss
    return loss


def _text(batch_size: int, length: int, padded: bool, pad: int = 0) -> Kwargs:
    ids = torch.randint(FIRST_WORD, VOCAB, (batch_size, length))
    if not padded:
        return {"input_ids": ids}
    kept = (length - 2 * torch.arange(batch_size)).clamp(min=1)
    mask = (torch.arange(length) < kept[:, None]).long()
    return {"input_ids": ids.masked_fill(mask == 0, pad), "attention_mask": mask}


def _causal(batch_size: int, length: int, padded: bool) -> Kwargs:
    batch = _text(batch_size, length, padded)
    ids = batch["input_ids"]
    return {**batch, "labels": ids.masked_fill(ids < FIRST_WORD, IGNORED)}


def _classify(batch_size: int, length: int, padded: bool, pad: int = 0) -> Kwargs:
    return {**_text(batch_size, length, padded, pad), "labels": torch.randint(CLASSES, (batch_size,))}


def _translate(batch_size: int, length: int, padded: bool) -> Kwargs:
    target = _causal(batch_size, length - 3, padded)  # another length: cross-attention is not square
    return {**_text(batch_size, length, padded), "labels": target["labels"]}


def _transcribe(batch_size: int, length: int, padded: bool) -> Kwargs:
    target = _causal(batch_size, length, padded)
    batch = {"input_features": torch.randn(batch_size, MELS, AUDIO_FRAMES), "labels": target["labels"]}
    return {**batch, "decoder_attention_mask": target["attention_mask"]} if padded else batch


def _picture(batch_size: int, length: int, padded: bool) -> Kwargs:
    pixels = torch.randn(batch_size, 3, length, length)
    return {"pixel_values": pixels, "labels": torch.randint(CLASSES, (batch_size,))}


def _tokens(batch_size: int, length: int, padded: bool) -> Kwargs:
    batch = _text(batch_size, length, padded)
    return {"ids": batch["input_ids"]} | ({"padding": batch["attention_mask"] == 0} if padded else {})


def _rows(batch_size: int, length: int, padded: bool) -> Kwargs:
    return {"input": torch.randn(batch_size, length, 32)}


_ENCODER: Kwargs = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_labels": CLASSES,
}
_TEXT_ENCODER: Kwargs = {**_ENCODER, "vocab_size": VOCAB, "max_position_embeddings": 64}
_DECODER: Kwargs = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def _llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_DECODER))


def _qwen3() -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**_DECODER, head_dim=16))


def _gemma3() -> nn.Module:
    heads: Kwargs = {"head_dim": 16, "query_pre_attn_scalar": 16}
    windows: Kwargs = {"sliding_window": 8, "sliding_window_pattern": 3}  # layers: sliding, sliding, full
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_DECODER | {"num_hidden_layers": 3}, **heads, **windows))


def _gpt2() -> nn.Module:
    sizes: Kwargs = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


def _bert() -> nn.Module:
    return hf.BertForSequenceClassification(hf.BertConfig(**_TEXT_ENCODER))


def _roberta() -> nn.Module:
    return hf.RobertaForSequenceClassification(hf.RobertaConfig(**_TEXT_ENCODER))


def _vit() -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**_ENCODER, image_size=IMAGE, patch_size=8))


def _swin() -> nn.Module:
    # The window stays below the feature map of both stages: else Swin writes a smaller one into its layers for good.
    sizes: Kwargs = {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 64}
    sizes["num_labels"] = CLASSES
    return hf.SwinForImageClassification(hf.SwinConfig(**sizes))


def _t5() -> nn.Module:
    sizes: Kwargs = {"vocab_size": VOCAB, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    sizes["decoder_start_token_id"] = 0
    sizes["use_cache"] = False  # a cache makes its keys contiguous, and products of such differ in the last bits
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes))


def _whisper() -> nn.Module:
    sizes: Kwargs = {"vocab_size": VOCAB, "d_model": 64, "num_mel_bins": MELS}
    sizes |= {"max_source_positions": AUDIO_FRAMES // 2, "max_target_positions": 32}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 128}
    special: Kwargs = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**sizes, **special))


def _mixtral() -> nn.Module:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**_DECODER, num_local_experts=4))


def _lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model  # seconds to import, so only where it is wanted

    targets = ["q_proj", "v_proj", "down_proj"]
    return get_peft_model(_llama(), LoraConfig(r=8, target_modules=targets, lora_dropout=0.1, task_type="CAUSAL_LM"))


class _Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 64)
        layer = nn.TransformerEncoderLayer(64, nhead=4, dim_feedforward=128, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, ids: Tensor, padding: Tensor | None = None) -> Tensor:
        logits: Tensor = self.head(self.encoder(self.embed(ids), src_key_padding_mask=padding)[:, 0])
        return logits


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 48), nn.GELU(), nn.Linear(48, CLASSES))


_TEXTS = ((2, 12), (3, 16))
_LAYERS = "model.layers.{}"

ZOO: tuple[Case, ...] = (
    Case("llama", _llama, _causal, _TEXTS, _LAYERS, 7, 6),
    Case("qwen3", _qwen3, _causal, _TEXTS, _LAYERS, 7, 6),
    Case("gemma3", _gemma3, _causal, _TEXTS, _LAYERS, 7, 6),
    Case("gpt2", _gpt2, _causal, _TEXTS, "transformer.h.{}", 4, 4),
    Case("bert", _bert, _classify, _TEXTS, "bert.encoder.layer.{}", 6, 6),
    Case("roberta", _roberta, partial(_classify, pad=1), _TEXTS, "roberta.encoder.layer.{}", 6, 6),
    Case("vit", _vit, _picture, ((2, IMAGE), (3, IMAGE)), "vit.layers.{}", 6, 5, paddable=False),
    Case("swin", _swin, _picture, ((2, 64), (3, 48)), "swin.encoder.layers.{}.blocks.{}", 6, 6, paddable=False),
    Case("t5", _t5, _translate, _TEXTS, "encoder.block.{}", 6, 6),
    Case("whisper", _whisper, _transcribe, _TEXTS, "model.encoder.layers.{}", 6, 6),
    Case("mixtral", _mixtral, _causal, _TEXTS, _LAYERS, 5, 4),
    Case("llama_lora", _lora, _causal, _TEXTS, "base_model.model.model.layers.{}", 13, 3),
    Case("torch_encoder", _Classifier, _tokens, _TEXTS, "encoder.layers.{}", 4, 4),
    Case("mlp", _mlp, _rows, _TEXTS, None, 3, 2, paddable=False),
)
