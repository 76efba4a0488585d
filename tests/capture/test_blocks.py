"""Regions are the repeated blocks, and outside of them the smallest modules with a trainable matrix."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.zoo import ZOO, Case
from velora_fx.capture import child_regions, find_regions, has_trainable_matrix

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Other(Block):
    """Another class of block."""


def model(**parts: nn.Module) -> nn.Module:
    made = nn.Module()
    for name, part in parts.items():
        made.add_module(name, part)
    return made


def llama_like() -> nn.Module:
    layers = nn.ModuleList(Block() for _ in range(3))
    body = model(embed_tokens=nn.Embedding(10, WIDTH), layers=layers, norm=nn.LayerNorm(WIDTH))
    return model(model=body, lm_head=nn.Linear(WIDTH, 10, bias=False))


def torch_encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True), 2)


def encoder_decoder() -> nn.Module:
    stacks = {name: model(block=nn.ModuleList([Block(), Block()])) for name in ("encoder", "decoder")}
    return model(shared=nn.Embedding(10, WIDTH), **stacks, lm_head=nn.Linear(WIDTH, 10))


FOUND: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "a Hugging Face causal model": (llama_like, ["model.layers.0", "model.layers.1", "model.layers.2", "lm_head"]),
    "nn.TransformerEncoder": (torch_encoder, ["layers.0", "layers.1"]),
    "an encoder and a decoder": (
        encoder_decoder,
        ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1", "lm_head"],
    ),
    "a ModuleDict of blocks": (
        lambda: model(layers=nn.ModuleDict({"first": Block(), "second": Block()})),
        ["layers.first", "layers.second"],
    ),
    "a Sequential of blocks": (lambda: model(body=nn.Sequential(Block(), Block())), ["body.0", "body.1"]),
    "blocks of two classes": (
        lambda: model(layers=nn.ModuleList([Block(), Other(), Block()])),
        ["layers.0", "layers.1", "layers.2"],
    ),
    "one block": (lambda: model(layers=nn.ModuleList([Block()])), ["layers.0"]),
    "stages of blocks, taken whole": (
        lambda: model(stages=nn.ModuleList(model(blocks=nn.ModuleList([Block(), Block()])) for _ in range(2))),
        ["stages.0", "stages.1"],
    ),
    "a Sequential of linears": (lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2)), [""]),
    "a list of linears": (lambda: model(experts=nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))), [""]),
    "a linear": (lambda: nn.Linear(WIDTH, 2), [""]),
    "nothing repeated": (lambda: model(body=Block(), head=nn.Linear(WIDTH, 2)), [""]),
    "modules outside of the blocks": (
        lambda: model(
            patches=nn.Conv2d(3, WIDTH, 4),
            layers=nn.ModuleList([Block(), Block()]),
            pooler=model(dense=nn.Linear(WIDTH, WIDTH), activation=nn.Tanh()),
            norm=nn.LayerNorm(WIDTH),
            head=nn.Linear(WIDTH, 2),
        ),
        ["patches", "layers.0", "layers.1", "pooler.dense", "head"],
    ),
    "an embedding alone": (lambda: nn.Embedding(10, WIDTH), []),
    "norms alone": (lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)), []),
}


@pytest.mark.parametrize("name", FOUND)
def test_the_regions_are(name):
    make, expected = FOUND[name]
    assert list(find_regions(make())) == expected


@pytest.mark.parametrize("name", FOUND)
def test_a_frozen_model_has_none(name):
    assert find_regions(FOUND[name][0]().requires_grad_(False)) == {}


def test_only_blocks_with_something_to_train_are_regions():
    made = llama_like().requires_grad_(False)
    made.model.layers[1].requires_grad_(True)
    assert list(find_regions(made)) == ["model.layers.1"]


def test_a_trained_norm_or_bias_in_a_frozen_block_is_nothing_to_train_by_a_product():
    made = llama_like().requires_grad_(False)
    for block in made.model.layers:
        block.norm.requires_grad_(True)
        block.mlp[0].bias.requires_grad_(True)
    assert find_regions(made) == {}


def test_lora_adapters_in_frozen_blocks_are_found():
    made = llama_like().requires_grad_(False)
    made.model.layers[0].lora = nn.Linear(WIDTH, 2)
    made.model.layers[2].lora = nn.Linear(WIDTH, 2)
    assert list(find_regions(made)) == ["model.layers.0", "model.layers.2"]


CASES = [case for case in ZOO if case.name not in ("llama_lora", "swin")]


@pytest.fixture(scope="module", params=CASES, ids=str)
def built(request: pytest.FixtureRequest) -> tuple[Case, nn.Module]:
    return request.param, request.param.build()


def test_the_blocks_of_every_model_of_the_zoo_are_regions(built):
    case, made = built
    assert set(case.blocks(made)) <= set(find_regions(made))


def test_regions_come_in_the_order_of_the_model_under_their_names(built):
    _, made = built
    order = [name for name, _ in made.named_modules()]
    regions = find_regions(made)
    assert sorted(regions, key=order.index) == list(regions)
    assert all(made.get_submodule(name) is module for name, module in regions.items())


def test_every_trained_matrix_lies_in_one_region(built):
    """Embeddings apart; so regions lie beside each other. What stays is in one, so that the report can tell why."""
    _, made = built
    regions = find_regions(made)
    embeddings = {id(e.weight) for e in made.modules() if isinstance(e, nn.Embedding)}
    for name, parameter in made.named_parameters():
        if parameter.dim() >= 2 and id(parameter) not in embeddings:
            owner = name.rpartition(".")[0]
            assert sum(owner == region or f"{owner}.".startswith(f"{region}.") or not region for region in regions) == 1


def test_the_parts_of_a_module_are_its_children_with_a_trained_matrix_also_in_containers():
    nested = nn.ModuleDict({"b": nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.ReLU())])})
    assert list(child_regions(Block(), "layers.3")) == ["layers.3.mlp.0", "layers.3.mlp.2"]
    assert list(child_regions(model(a=Block(), b=nn.ReLU(), c=nn.Embedding(3, 3)), "")) == ["a"]
    assert list(child_regions(model(a=nested), "")) == ["a.b.0.0"]


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        *((module, True) for module in (nn.Linear(2, 2), nn.Conv1d(2, 2, 1), nn.Linear(2, 2, device="meta"), Block())),
        *((module, False) for module in (nn.LayerNorm(2), nn.Embedding(2, 2), nn.EmbeddingBag(2, 2), nn.Identity())),
        (nn.Linear(2, 2).requires_grad_(False), False),
    ],
    ids=str,
)
def test_a_trainable_matrix_is_found(module, expected):
    assert has_trainable_matrix(module) == expected


def test_a_trainable_matrix_of_a_child_counts_only_where_asked():
    assert not has_trainable_matrix(Block(), recurse=False)
    assert has_trainable_matrix(nn.Linear(2, 2), recurse=False)


def test_finding_regions_changes_nothing():
    made = llama_like()
    before = {name: id(tensor) for name, tensor in made.state_dict(keep_vars=True).items()}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    find_regions(made)
    assert {name: id(tensor) for name, tensor in made.state_dict(keep_vars=True).items()} == before
    assert torch.equal(torch.get_rng_state(), state)
