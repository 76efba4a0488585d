"""Models that are planned for without their weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from velora_fx.cli.presets import import_path, load

LLAMA: dict[str, Any] = {"model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128}
LLAMA |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
BERT: dict[str, Any] = {**LLAMA, "model_type": "bert", "num_labels": 3}
VIT: dict[str, Any] = {**BERT, "model_type": "vit", "image_size": 32, "patch_size": 8}
T5: dict[str, Any] = {"model_type": "t5", "vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1}
T5 |= {"num_heads": 4, "decoder_start_token_id": 0}


def config_file(folder: Path, config: dict[str, Any], *architectures: str) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps({**config, "architectures": list(architectures)} if architectures else config))
    return str(path)


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Makes a new module with the given function `make` and returns the path to import it by."""
    name = f"models_of_{tmp_path.name}"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)

    def write(source: str) -> str:
        (tmp_path / f"{name}.py").write_text(f"import torch\nfrom torch import nn\n{source}\n")
        return f"{name}:make"

    return write


@pytest.mark.parametrize(
    ("preset", "parameters", "longest"),
    [
        ("llama-60m", 58_073_600, 2048),
        ("llama-130m", 134_105_856, 2048),
        ("llama-350m", 367_969_280, 2048),
        ("llama-1b", 1_339_082_752, 2048),
        ("llama-7b", 6_738_415_616, 2048),
        ("llama-3-8b", 8_030_261_248, 2048),
        ("gpt2-xl", 1_557_611_200, 1024),
        ("bert-base", 109_514_298, 512),
    ],
)
def test_a_text_preset_has_its_published_size_and_no_memory(preset: str, parameters: int, longest: int) -> None:
    model, inputs = load(preset, batch_size=3)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert all(t.is_meta and t.dtype == torch.bfloat16 for t in model.parameters())
    assert model.training
    found = {name: (tuple(t.shape), t.device.type) for name, t in inputs.items()}
    assert found == dict.fromkeys(("input_ids", "labels"), ((3, longest), "cpu"))


def test_the_image_preset_takes_images_and_one_label_each() -> None:
    model, inputs = load("vit-b-16", batch_size=2, dtype=torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == 86_567_656
    assert inputs["pixel_values"].shape == (2, 3, 224, 224)
    assert inputs["pixel_values"].is_meta and inputs["pixel_values"].dtype == torch.float32
    assert inputs["labels"].shape == (2,) and not inputs["labels"].is_meta


def test_weights_tied_by_the_config_stay_tied() -> None:
    model, _ = load("gpt2-xl", seq_len=8)
    assert model.get_parameter("lm_head.weight") is model.get_parameter("transformer.wte.weight")


@pytest.mark.parametrize(
    ("config", "architecture", "made", "shapes"),
    [
        (LLAMA, (), "LlamaForCausalLM", {"input_ids": (2, 12), "labels": (2, 12)}),
        (LLAMA, ("LlamaForSequenceClassification",), None, {"input_ids": (2, 12), "labels": (2,)}),
        (BERT, ("BertForTokenClassification",), None, {"input_ids": (2, 12), "labels": (2, 12)}),
        (BERT, ("BertForMaskedLM",), None, {"input_ids": (2, 12), "labels": (2, 12)}),
        (VIT, ("ViTForImageClassification",), None, {"pixel_values": (2, 3, 32, 32), "labels": (2,)}),
        (T5, ("T5ForConditionalGeneration",), None, {"input_ids": (2, 12), "labels": (2, 12)}),
    ],
)
def test_a_config_file_becomes_the_model_it_names_with_inputs_that_it_takes(
    tmp_path: Path, config: dict[str, Any], architecture: tuple[str, ...], made: str | None, shapes: dict[str, Any]
) -> None:
    length = None if config is VIT else 12
    model, inputs = load(config_file(tmp_path, config, *architecture), 2, length, torch.float32)
    assert type(model).__name__ == (made or architecture[0])
    assert {name: tuple(tensor.shape) for name, tensor in inputs.items()} == shapes
    real = {name: torch.zeros_like(t, device="cpu") if t.is_meta else t for name, t in inputs.items()}
    assert type(model)(model.config)(**real).loss.shape == ()


def test_a_folder_with_a_config_is_as_good_as_the_file(tmp_path: Path) -> None:
    config_file(tmp_path, LLAMA)
    model, _ = load(str(tmp_path))
    assert type(model).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(("seq_len", "length"), [(None, 64), (100, 100)])  # rotary positions have no end
def test_without_a_length_a_text_is_as_long_as_the_model_takes(tmp_path: Path, seq_len: Any, length: int) -> None:
    _, inputs = load(config_file(tmp_path, LLAMA), seq_len=seq_len)
    assert inputs["input_ids"].shape == (1, length)


def test_a_factory_gives_its_model_and_inputs_as_they_are(factory: Any) -> None:
    model, inputs = load(factory("def make(): return nn.Linear(4, 2), (torch.randn(3, 4),)"))
    assert model.weight.is_meta and model.weight.dtype == torch.float32
    assert inputs[0].shape == (3, 4)


def test_a_dtype_that_is_asked_for_also_holds_for_a_factory(factory: Any) -> None:
    path = factory("def make(): return nn.Linear(4, 2), {'input': torch.randn(3, 4)}")
    model, inputs = load(path, dtype=torch.bfloat16)
    assert model.weight.dtype == inputs["input"].dtype == torch.bfloat16


def test_integers_that_a_factory_makes_on_meta_become_real_ones(factory: Any) -> None:
    _, inputs = load(factory("def make(): return nn.Embedding(9, 4), {'input': torch.arange(3)}"))
    assert inputs["input"].tolist() == [1, 1, 1]


def test_a_factory_of_a_hugging_face_model_needs_no_inputs(factory: Any) -> None:
    sizes = {name: value for name, value in LLAMA.items() if name != "model_type"}
    source = f"import transformers as t\ndef make(): return t.LlamaForCausalLM(t.LlamaConfig(**{sizes}))"
    _, inputs = load(factory(source), 2, 12)
    assert inputs["input_ids"].shape == (2, 12)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def make(): raise RuntimeError('no luck')", "the factory '.*:make' raised RuntimeError: no luck"),
        ("def make(): return 3", "must return a model or .model, example inputs., got int"),
        ("def make(): return nn.Linear(2, 2)", "no example inputs are known for Linear: pass package.module:factory"),
        ("make = 3", "must be a function that returns a model, it is of type int"),
        ("def other(): pass", "has no 'make'"),
        ("import nothing_of_this_name", "raised ModuleNotFoundError: No module named 'nothing_of_this_name'"),
    ],
)
def test_a_factory_that_cannot_be_used_is_an_error_that_says_why(factory: Any, source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(factory(source))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("llama-8b",), "unknown model 'llama-8b': pass one of the presets llama-60m, llama-130m"),
        (("missing/config.json",), "there is no config file missing/config.json"),
        (("./missing",), "there is no config file ./missing"),
        (("llama-60m", 0), "batch_size must be a positive integer, got 0"),
        (("vit-b-16", 1, 8), "ViTForImageClassification takes images, whose size the config gives: leave out seq_len"),
        (("llama-60m", 1, -1), "seq_len must be a positive integer, got -1"),
        (("bert-base", 1, 513), "seq_len must be at most 512, the number of positions of the model, got 513"),
    ],
)
def test_a_model_or_size_that_does_not_exist_is_an_error_that_says_what_does(
    arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(*arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a valid JSON file"),
        ('{"hidden_size": 3}', "Should have a `model_type` key"),
        ('{"model_type": "llama", "hidden_size": "x"}', "Field 'hidden_size' expected int"),
        ('{"model_type": "bert", "architectures": ["BertModel"]}', "no example inputs are known for BertModel"),
        ('{"model_type": "vit"}', "AutoModelForCausalLM cannot make"),
    ],
)
def test_a_config_that_is_no_model_is_an_error_of_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load(str(path))
    assert "\n" not in str(error.value)


def test_a_hub_id_that_cannot_be_reached_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, **_: Any) -> None:
        raise OSError(f"We couldn't connect to the hub to load {name}.\nCheck your internet connection.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(ValueError, match=r"'owner/name' cannot be read from the hub: .* Check your internet") as error:
        load("owner/name")
    assert "\n" not in str(error.value)


def test_without_transformers_a_preset_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "velora-fx\[demo\]"'):
        load("llama-60m")


def test_an_import_path_finds_an_object() -> None:
    assert import_path("torch.optim:Adagrad") is torch.optim.Adagrad
