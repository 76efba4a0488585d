"""What the analysis says is saved equals what autograd saves of the eager module, and names who saves it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import prod

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from tests.helpers.graph_text import graph_text, prepared
from velora_fx.capture import state_of
from velora_fx.passes.find_products import find_products
from velora_fx.simulate import Saving, fake_mode, fake_tensor
from velora_fx.simulate.saved_tensors import saved_tensors

WIDTH = 16


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (part(h).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24, bias=False), nn.Linear(24, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(F.silu(self.gate(x)) * self.up(x)))


class Gpt2(nn.Module):
    """Weights stored as [in, out], like transformers.pytorch_utils.Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.proj = nn.Parameter(torch.randn(WIDTH, 24)), nn.Parameter(torch.randn(24, WIDTH))
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(x.flatten(0, 1) @ self.fc, approximate="tanh")
        return torch.addmm(self.bias, h, self.proj).view_as(x)


class Swapped(nn.Module):
    """Linears over another dimension than the last, so that one has to copy its input."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.channels = nn.Linear(6, 6), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.channels(self.tokens(x.sin().transpose(1, 2)).transpose(1, 2))


class Stretches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = self.a(x).sigmoid()
        with torch.autocast("cpu", torch.bfloat16):
            h = self.b(x * gate)
        return self.a(h.float())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.exp()).tanh())


class Frozen(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.up.requires_grad_(False)
        self.down.requires_grad_(False)


class Regression(nn.Module):
    """The transpose of a weight with one row is contiguous, as an input is."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.score = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(F.gelu(self.body(x)))


MODULES = (Attention, Mlp, Gpt2, Swapped, Stretches, Tied, Frozen, Regression)


def rows(batch_size: int = 3) -> Tensor:
    """Like the input of a block in a model: computed by something that is trained."""
    leaf = torch.randn(batch_size, 6, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    return leaf * 1


@cache
def graph_of(kind: Callable[[], nn.Module], batch_size: int) -> tuple[nn.Module, GraphModule]:
    module = kind()
    return module, prepared(module, rows(batch_size))


def savings(
    kind: Callable[[], nn.Module], *, batch_size: int = 3, fake: bool = False, autocast: bool = False
) -> tuple[Saving, ...]:
    module, gm = graph_of(kind, batch_size)
    inputs = [*state_of(module).values(), rows(batch_size)]
    if fake:
        mode = fake_mode()
        inputs = [fake_tensor(tensor, mode) for tensor in inputs]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return saved_tensors(gm, inputs)


def kept_by_autograd(module: nn.Module, x: Tensor, autocast: bool = False) -> dict[int, int]:
    """Bytes of every storage that autograd keeps of the eager module, by address; parameters and buffers apart."""
    own = {tensor.untyped_storage().data_ptr() for tensor in state_of(module).values()}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)  # held, so that no address is used twice
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        module(x)
    storages = [tensor.untyped_storage() for tensor in kept]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in own}


def by_consumer(found: tuple[Saving, ...]) -> dict[str, list[Saving]]:
    linears = [saving for saving in found if saving.consumer is not None]
    return {str(saving.consumer): [s for s in linears if s.consumer == saving.consumer] for saving in linears}


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize("autocast", [False, True], ids=["no autocast", "autocast"])
@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_the_saved_storages_are_those_that_autograd_keeps_of_the_eager_module(kind, autocast, fake):
    ours = {saving.storage: saving.num_bytes for saving in savings(kind, fake=fake, autocast=autocast)}
    assert sorted(ours.values()) == sorted(kept_by_autograd(kind(), rows(), autocast).values())


@pytest.mark.parametrize("autocast", [False, True], ids=["no autocast", "autocast"])
@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_what_a_linear_saves_is_as_large_as_its_input_or_a_cast_weight(kind, autocast):
    weights = {2 * parameter.numel() for parameter in kind().parameters()}
    for saving in savings(kind, autocast=autocast):
        if saving.consumer is not None:
            assert saving.num_bytes in (2 * prod(saving.shape), 4 * prod(saving.shape))
        elif saving.operation == "linear":
            assert saving.num_bytes in weights


def test_query_key_and_value_save_one_storage():
    found = by_consumer(savings(Attention))
    assert len({saving.storage for name in ("q", "k", "v") for saving in found[name]}) == 1


def test_under_autocast_query_key_and_value_save_a_copy_each():
    found = by_consumer(savings(Attention, autocast=True))
    assert len({saving.storage for name in ("q", "k", "v") for saving in found[name]}) == 3


def test_the_input_of_the_output_projection_is_saved_by_attention_too():
    found = savings(Attention)
    (projection,) = by_consumer(found)["o"]
    assert "attention" in [saving.operation for saving in found if saving.storage == projection.storage]


def test_a_linear_with_a_frozen_weight_saves_no_input():
    assert list(by_consumer(savings(Frozen))) == ["gate"]


def test_a_linear_saves_nothing_inside_no_grad():
    assert sum(saving.consumer == "a" for saving in savings(Stretches)) == 0
    assert sum(saving.consumer == "a#2" for saving in savings(Stretches)) == 1


def test_a_frozen_module_on_an_input_without_gradient_saves_nothing():
    module, gm = graph_of(Mlp, 3)
    state = [tensor.detach() for tensor in state_of(module).values()]
    assert saved_tensors(gm, [*state, rows().detach()]) == ()


def test_the_copy_of_an_input_that_cannot_be_flattened_belongs_to_the_linear():
    found = savings(Swapped)
    (tokens,) = by_consumer(found)["tokens"]
    assert [saving.operation for saving in found if saving.storage == tokens.storage] == ["linear"]
    assert tokens.shape == (3, WIDTH, 6)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_cast_copy_of_a_transposed_input_belongs_to_the_linear(batch_size):
    found = by_consumer(savings(Swapped, batch_size=batch_size, autocast=True))
    assert [len(found[name]) for name in ("tokens", "channels")] == [1, 1]


@pytest.mark.parametrize("kind", [Regression, Gpt2, Mlp, Tied], ids=lambda kind: kind.__name__)
def test_the_cast_copy_of_a_weight_is_not_the_input(kind):
    found = by_consumer(savings(kind, autocast=True))
    assert {name: len(saved) for name, saved in found.items()} == dict.fromkeys(found, 1)


def test_a_saving_tells_shape_and_dtype_of_the_input_and_its_node():
    (down,) = by_consumer(savings(Mlp))["down"]
    _, gm = graph_of(Mlp, 3)
    (product,) = (product for product in find_products(gm) if product.consumer == "down")
    assert (down.shape, down.dtype, down.x) == ((3, 6, 24), torch.float32, str(product.node.args[0]))


def test_a_hook_of_the_caller_sees_nothing():
    seen: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        savings(Mlp, fake=True)
    assert seen == []


@pytest.mark.parametrize("kind", [Mlp, Attention, Stretches], ids=lambda kind: kind.__name__)
def test_the_graph_is_left_as_it_was(kind):
    module, gm = graph_of(kind, 3)
    before = graph_text(gm)
    saved_tensors(gm, [*state_of(module).values(), rows()])
    assert graph_text(gm) == before
