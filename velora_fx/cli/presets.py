"""Models to plan for without their weights: presets, Hugging Face configs, and the user's own factories."""

from __future__ import annotations

import importlib
import os
import textwrap
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch

Preset = tuple[str, str, dict[str, Any]]
DEFAULT_DTYPE = torch.bfloat16
LONGEST_DEFAULT = 2048
FIRST_WORD = 4  # the ids below it are special tokens in most vocabularies

# How an architecture's name ends, the Auto class that makes it, and what its labels are.
TASKS = (
    ("ForCausalLM", "AutoModelForCausalLM", "tokens"),
    ("LMHeadModel", "AutoModelForCausalLM", "tokens"),
    ("ForMaskedLM", "AutoModelForMaskedLM", "tokens"),
    ("ForConditionalGeneration", "AutoModelForSeq2SeqLM", "tokens"),
    ("ForTokenClassification", "AutoModelForTokenClassification", "class of each token"),
    ("ForSequenceClassification", "AutoModelForSequenceClassification", "class"),
    ("ForImageClassification", "AutoModelForImageClassification", "class"),
)


def _llama(hidden: int, intermediate: int, layers: int, heads: int, **more: Any) -> Preset:
    sizes = {
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
    }
    return "llama", "LlamaForCausalLM", {**sizes, **more}


LLAMA_3: dict[str, Any] = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
# The sizes from 60m to 7b are those of the pre-training runs of GaLore (arXiv 2403.03507), which VeLoRA repeats.
PRESETS: Mapping[str, Preset] = {
    "llama-60m": _llama(512, 1376, 8, 8),
    "llama-130m": _llama(768, 2048, 12, 12),
    "llama-350m": _llama(1024, 2736, 24, 16),
    "llama-1b": _llama(2048, 5461, 24, 32),
    "llama-7b": _llama(4096, 11008, 32, 32),
    "llama-3-8b": _llama(4096, 14336, 32, 32, **LLAMA_3),
    "gpt2-xl": ("gpt2", "GPT2LMHeadModel", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "bert-base": ("bert", "BertForMaskedLM", {}),
    "vit-b-16": ("vit", "ViTForImageClassification", {"num_labels": 1000}),
}


def load(
    model: str, batch_size: int | None = None, seq_len: int | None = None, dtype: torch.dtype | None = None
) -> tuple[torch.nn.Module, Any]:
    """A model on the meta device in training mode, and example inputs for it: integers real, other tensors on meta.

    Args:
        model: a preset; a Hugging Face config (a JSON file, a folder with a config.json, or a hub id owner/name); or
            `package.module:factory`, where `factory()` returns a model or (model, example inputs).
        batch_size: texts or images, by default one; neither this nor `seq_len` where a factory returns inputs.
        seq_len: tokens of each text, by default what the model takes up to 2048; images have the config's size.
        dtype: of weights and inputs, by default bfloat16; what a factory makes stays as it is by default.

    Raises:
        ValueError: a model that is not found or cannot be made, or sizes that do not fit it.
        ImportError: transformers is needed and not installed.
    """
    for name, size in (("batch_size", batch_size), ("seq_len", seq_len)):
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(f"{name} must be a positive integer, got {size!r}")
    if model not in PRESETS and not _is_path(model) and ":" in model:
        made, inputs = _from_factory(model)
        if dtype is not None:
            made, inputs = made.to(dtype), _cast(inputs, dtype)
    else:
        made, inputs = _from_config(_config(model), model, dtype or DEFAULT_DTYPE), None
    if inputs is None:
        inputs = _example_inputs(made, batch_size or 1, seq_len)
    elif batch_size is not None or seq_len is not None:
        raise ValueError(f"{model} returns its own example inputs: leave out batch_size and seq_len")
    return made.train(), inputs


def import_path(path: str) -> Any:
    """The object that `package.module:name` stands for; raises ValueError if there is none."""
    module, _, name = path.partition(":")
    try:
        found = importlib.import_module(module)
    except Exception as error:
        raise ValueError(f"{path!r}: importing {module!r} raised {type(error).__name__}: {_brief(error)}") from error
    if not hasattr(found, name):
        raise ValueError(f"{path!r}: the module {module} has no {name!r}")
    return getattr(found, name)


def _from_factory(path: str) -> tuple[torch.nn.Module, Any]:
    factory = import_path(path)
    if not callable(factory):
        raise ValueError(f"{path!r} must be a function that returns a model, it is of type {type(factory).__name__}")
    try:
        with torch.device("meta"):
            result = factory()
    except Exception as error:
        raise ValueError(f"the factory {path!r} raised {type(error).__name__}: {_brief(error)}") from error
    made, inputs = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(made, torch.nn.Module):
        raise ValueError(
            f"the factory {path!r} must return a model or (model, example inputs), got {type(made).__name__}"
        )
    return made, _real_integers(inputs)


def _real_integers(value: Any) -> Any:
    """Example inputs with ones instead of integers on the meta device: planning follows the values of integers."""
    if isinstance(value, torch.Tensor):
        return value if value.is_floating_point() or not value.is_meta else torch.ones_like(value, device="cpu")
    return _rebuilt(value, _real_integers)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return _rebuilt(value, lambda item: _cast(item, dtype))


def _rebuilt(value: Any, function: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: function(item) for key, item in value.items()}
    return type(value)(map(function, value)) if type(value) in (tuple, list) else value


def _transformers() -> ModuleType:
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(
            'presets and Hugging Face configs need transformers: pip install "velora-fx[demo]"'
        ) from error


def _is_path(model: str) -> bool:
    return os.path.exists(model) or model.endswith(".json") or model.startswith((".", "/", "~"))


def _config(model: str) -> Any:
    if model in PRESETS:
        kind, architecture, sizes = PRESETS[model]
        return _transformers().AutoConfig.for_model(kind, architectures=[architecture], **sizes)
    if not _is_path(model) and model.count("/") != 1:
        raise ValueError(
            f"unknown model {model!r}: pass one of the presets {', '.join(PRESETS)}, "
            "the path of a Hugging Face config, a hub id owner/name, or package.module:factory"
        )
    path = os.path.expanduser(model)
    if _is_path(model):
        file = os.path.join(path, "config.json") if os.path.isdir(path) else path
        if not os.path.isfile(file):
            raise ValueError(f"there is no config file {file}")
    auto_config = _transformers().AutoConfig
    try:
        return auto_config.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        where = "" if _is_path(model) else " from the hub"
        raise ValueError(f"the config of {model!r} cannot be read{where}: {_brief(error)}") from error


def _from_config(config: Any, model: str, dtype: torch.dtype) -> torch.nn.Module:
    architecture = (config.architectures or ["ForCausalLM"])[0]
    auto_class, _ = _task(architecture)
    if auto_class == "AutoModelForSequenceClassification" and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0  # these models find the last token of each text by it
    if hasattr(config, "use_cache"):
        config.use_cache = False  # a cache is never read in training, and a compiled model would return it
    made_by = getattr(_transformers(), auto_class)
    try:
        with torch.device("meta"):
            made = made_by.from_config(config, dtype=dtype)
    except Exception as error:
        raise ValueError(f"{auto_class} cannot make {model!r}: {_brief(error)}") from error
    assert isinstance(made, torch.nn.Module)
    return made


def _task(architecture: str) -> tuple[str, str]:
    """The Auto class of an architecture and the kind of its labels."""
    for ending, auto_class, labels in TASKS:
        if architecture.endswith(ending):
            return auto_class, labels
    raise _no_inputs(architecture)


def _no_inputs(name: str) -> ValueError:
    return ValueError(
        f"no example inputs are known for {name}: pass package.module:factory that returns (model, example inputs), "
        f"or a text or image model whose class name ends with {', '.join(ending for ending, _, _ in TASKS)}"
    )


def _example_inputs(model: torch.nn.Module, batch_size: int, seq_len: int | None) -> dict[str, torch.Tensor]:
    """One batch with labels for a Hugging Face model."""
    config: Any = getattr(model, "config", None)
    main_input = getattr(model, "main_input_name", None)
    _, labels = _task(type(model).__name__)
    if config is None or main_input not in ("input_ids", "pixel_values"):
        raise _no_inputs(type(model).__name__)
    generator = torch.Generator().manual_seed(0)
    if main_input == "pixel_values":
        if seq_len is not None:
            raise ValueError(f"{type(model).__name__} takes images, whose size the config gives: leave out seq_len")
        sides = config.image_size if isinstance(config.image_size, (tuple, list)) else [config.image_size] * 2
        shape = (batch_size, getattr(config, "num_channels", 3), *sides)
        inputs = {main_input: torch.empty(shape, dtype=next(model.parameters()).dtype, device="meta")}
    else:
        words = config.get_text_config().vocab_size
        shape = (batch_size, _length(config, seq_len))
        inputs = {main_input: torch.randint(min(FIRST_WORD, words - 1), words, shape, generator=generator)}
    classes = config.get_text_config().vocab_size if labels == "tokens" else config.num_labels
    return {**inputs, "labels": torch.randint(classes, shape[:1] if labels == "class" else shape, generator=generator)}


def _length(config: Any, seq_len: int | None) -> int:
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    rotary = getattr(config.get_text_config(), "rope_parameters", None) is not None
    if seq_len is not None and longest is not None and seq_len > longest and not rotary:
        raise ValueError(f"seq_len must be at most {longest}, the number of positions of the model, got {seq_len}")
    return seq_len or min(longest or LONGEST_DEFAULT, LONGEST_DEFAULT)


def _brief(error: Exception) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 240, placeholder=" ...")
