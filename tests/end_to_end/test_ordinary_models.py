"""Models with a loss, an activation or weights that are no plain operator's are planned for like others."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

import velora_fx
from tests.helpers.gradients import assert_same_gradients, compressed_weights, step, tightest
from tests.helpers.peaks import assert_predicted, measured_peak, predict
from tests.helpers.zoo import loss_of
from velora_fx.capture import attached_tensors

SPEECH: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
}


@pytest.mark.parametrize(
    ("model", "config"), [(hf.Wav2Vec2ForCTC, hf.Wav2Vec2Config), (hf.HubertForCTC, hf.HubertConfig)]
)
def test_a_step_with_a_ctc_loss_is_predicted_to_the_byte(model, config):
    built = model(config(**SPEECH)).train()
    batch = {"input_values": torch.randn(2, 1000), "labels": torch.randint(1, 32, (2, 7))}
    predicted = predict(built, batch, loss_fn=loss_of)
    assert predicted.untouched_bytes == measured_peak(built, batch, loss_of=loss_of)
    compressed_bytes = measured_peak(predicted.compressed, batch, loss_of=loss_of)
    assert predicted.compressed_bytes == compressed_bytes < predicted.untouched_bytes


def text(vocabulary: int = 96) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, vocabulary, (4, 32))
    return {"input_ids": ids, "labels": ids}


def bloom() -> nn.Module:
    torch.manual_seed(0)
    return hf.BloomForCausalLM(hf.BloomConfig(vocab_size=96, hidden_size=64, n_layer=2, n_head=4, use_cache=False))


@pytest.mark.parametrize("target", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_blocks_with_an_autograd_function_are_predicted(target):
    """The GELU of Bloom has a backward of its own: no graph stands for it in training."""
    model, batch = bloom().train(), text()
    predicted = predict(model, batch, compiled=target == "inductor", loss_fn=loss_of)
    measured = measured_peak(model, batch, target, loss_of)
    assert predicted.untouched_bytes == pytest.approx(measured, rel=1e-4)
    measured = measured_peak(predicted.compressed, batch, target, loss_of)
    assert predicted.compressed_bytes == pytest.approx(measured, rel=1e-4)
    assert predicted.compressed_bytes < predicted.untouched_bytes


def quantised(kind: str) -> nn.Module:
    """A small Llama on a quantised base, with LoRA."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        use_cache=False,
    )
    model = hf.LlamaForCausalLM(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            shape = module.in_features, module.out_features
            if kind == "4 bits":
                made = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=torch.float32, quant_type="nf4")
            else:
                made = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False)
            made.load_state_dict(module.state_dict())
            model.set_submodule(name, made.to("cpu"))
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    return peft.get_peft_model(model.requires_grad_(False), peft.LoraConfig(r=4, target_modules=targets)).train()


def attached_bytes(model: nn.Module) -> int:
    """Bytes that come with the parameters, shared storages once, but for those of parameters themselves."""
    storages = {t.untyped_storage()._cdata: t for p in model.parameters() for t in attached_tensors(p)}
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    return sum(t.untyped_storage().nbytes() for key, t in storages.items() if key not in own)


@pytest.mark.parametrize("kind", ["4 bits", "8 bits"])
def test_lora_on_a_quantised_base_is_predicted(kind):
    model, batch = quantised(kind), text()
    attached = attached_bytes(model)
    predicted = predict(model, batch, loss_fn=loss_of)
    measured = measured_peak(model, batch, loss_of=loss_of) + attached
    assert predicted.untouched_bytes == pytest.approx(measured, rel=1e-4)
    measured = measured_peak(predicted.compressed, batch, loss_of=loss_of) + attached
    assert predicted.compressed_bytes == pytest.approx(measured, rel=1e-4)
    assert predicted.compressed_bytes < predicted.untouched_bytes


def test_lora_on_a_quantised_base_trains_as_untouched_but_for_compressed_weights():
    model, batch = quantised("4 bits"), text()
    reference = copy.deepcopy(model)
    plan = tightest(model, batch)
    velora_fx.apply(model, plan, batch)
    approximate = set(compressed_weights(model))
    assert any("lora_A" in name for name in approximate)
    assert any("is it quantised?" in note for note in plan.notes)
    torch.testing.assert_close(step(model, batch, loss_of).loss, step(reference, batch, loss_of).loss, rtol=0, atol=0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert_same_gradients(model, reference, trained - approximate)


def test_a_quantised_base_is_refused_for_a_compiled_step_with_what_to_do():
    with pytest.raises(ValueError, match=r"MatMul4Bit, an autograd.Function around .*use compiled=False"):
        velora_fx.plan(quantised("4 bits"), None, text(), compiled=True)


def test_experts_whose_products_are_written_in_place_can_be_planned_for_and_are_listed() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = hf.GptOssForCausalLM(hf.GptOssConfig(**sizes, **heads, use_cache=False)).train()
    ids = torch.randint(64, (4, 16))
    plan = tightest(model, {"input_ids": ids, "labels": ids})
    assert plan.compressed
    skipped = {item.module for item in plan.skipped}
    assert {f"model.layers.{n}.mlp.experts.{w}" for n in (0, 1) for w in ("gate_up_proj", "down_proj")} <= skipped


class Masking(nn.Module):
    """Puts a parameter where a mask is, as SpecAugment does."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(64))
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(x.shape[:2], dtype=torch.bool)
        mask[:, 2:9] = True
        h = self.first(x) * 2
        h[mask] = self.embedding
        return self.second(F.gelu(h)).square().mean()


def test_a_real_mask_among_indices_picks_what_it_picks() -> None:
    torch.manual_seed(0)
    assert_predicted(Masking().train(), {"x": torch.randn(8, 32, 64)}, "eager")
