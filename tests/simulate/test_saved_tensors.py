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

from tests.helpers.gradients import saved_by
from tests.helpers.graph_text import graph_text, prepared
from tests.helpers.toys import Of
from velora_fx.capture import state_of
from velora_fx.passes.find_products import find_products
from velora_fx.simulate import Saving, fake_mode, fake_tensor
from velora_fx.simulate.saved_tensors import saved_tensors

WIDTH = 16


def linears(*names: str) -> dict[str, nn.Module]:
    return {name: nn.Linear(WIDTH, WIDTH) for name in names}


def attend(m: Of, x: Tensor) -> Tensor:
    h = m.norm(x)
    q, k, v = (part(h).unflatten(-1, (2, -1)).transpose(1, 2) for part in (m.q, m.k, m.v))
    return x + m.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def attention() -> Of:
    return Of(attend, norm=nn.LayerNorm(WIDTH), **linears(*"qkvo"))


def mlp() -> Of:
    gate, up, down = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24, bias=False), nn.Linear(24, WIDTH)
    parts = {"gate": gate, "up": up, "down": down, "dropout": nn.Dropout(0.1)}
    return Of(lambda m, x: m.dropout(m.down(F.silu(m.gate(x)) * m.up(x))), **parts)


def frozen() -> Of:
    module = mlp()
    module.up.requires_grad_(False)
    module.down.requires_grad_(False)
    return module


def conv1d(m: Of, x: Tensor) -> Tensor:
    h = F.gelu(x.flatten(0, 1) @ m.fc, approximate="tanh")
    return torch.addmm(m.bias, h, m.proj).view_as(x)


def gpt2() -> Of:
    """Weights stored as [in, out], like transformers.pytorch_utils.Conv1D."""
    shapes = {"fc": (WIDTH, 24), "proj": (24, WIDTH), "bias": (WIDTH,)}
    return Of(conv1d, **{name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()})


def swapped() -> Of:
    """Linears over another dimension than the last, so that one has to copy its input."""
    parts = {"tokens": nn.Linear(6, 6), **linears("channels")}
    return Of(lambda m, x: m.channels(m.tokens(x.sin().transpose(1, 2)).transpose(1, 2)), **parts)


def stretch(m: Of, x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = m.a(x).sigmoid()
    with torch.autocast("cpu", torch.bfloat16):
        h = m.b(x * gate)
    return m.a(h.float())


def stretches() -> Of:
    return Of(stretch, **linears("a", "b"))


def tied() -> Of:
    module = Of(lambda m, x: m.b(m.a(x.exp()).tanh()), **linears("a", "b"))
    module.b.weight = module.a.weight
    return module


def regression() -> Of:
    """The transpose of a weight with one row is contiguous, as an input is."""
    return Of(lambda m, x: m.score(F.gelu(m.body(x))), score=nn.Linear(WIDTH, 1), **linears("body"))


MODULES = (attention, mlp, gpt2, swapped, stretches, tied, frozen, regression)


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
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kept = saved_by(lambda: module(x))
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


@pytest.mark.parametrize(("autocast", "num_storages"), [(False, 1), (True, 3)])
def test_query_key_and_value_save_one_storage_and_under_autocast_a_copy_each(autocast, num_storages):
    found = by_consumer(savings(attention, autocast=autocast))
    assert len({saving.storage for name in ("q", "k", "v") for saving in found[name]}) == num_storages


def test_the_input_of_the_output_projection_is_saved_by_attention_too():
    found = savings(attention)
    (projection,) = by_consumer(found)["o"]
    assert "attention" in [saving.operation for saving in found if saving.storage == projection.storage]


def test_a_linear_with_a_frozen_weight_saves_no_input():
    assert list(by_consumer(savings(frozen))) == ["gate"]


def test_a_linear_saves_nothing_inside_no_grad():
    assert sum(saving.consumer == "a" for saving in savings(stretches)) == 0
    assert sum(saving.consumer == "a#2" for saving in savings(stretches)) == 1


def test_a_frozen_module_on_an_input_without_gradient_saves_nothing():
    module, gm = graph_of(mlp, 3)
    state = [tensor.detach() for tensor in state_of(module).values()]
    assert saved_tensors(gm, [*state, rows().detach()]) == ()


def test_the_copy_of_an_input_that_cannot_be_flattened_belongs_to_the_linear():
    found = savings(swapped)
    (tokens,) = by_consumer(found)["tokens"]
    assert [saving.operation for saving in found if saving.storage == tokens.storage] == ["linear"]
    assert tokens.shape == (3, WIDTH, 6)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_cast_copy_of_a_transposed_input_belongs_to_the_linear(batch_size):
    found = by_consumer(savings(swapped, batch_size=batch_size, autocast=True))
    assert [len(found[name]) for name in ("tokens", "channels")] == [1, 1]


@pytest.mark.parametrize("kind", [regression, gpt2, mlp, tied], ids=lambda kind: kind.__name__)
def test_the_cast_copy_of_a_weight_is_not_the_input(kind):
    found = by_consumer(savings(kind, autocast=True))
    assert {name: len(saved) for name, saved in found.items()} == dict.fromkeys(found, 1)


def test_a_saving_tells_shape_and_dtype_of_the_input_and_its_node():
    (down,) = by_consumer(savings(mlp))["down"]
    _, gm = graph_of(mlp, 3)
    (product,) = (product for product in find_products(gm) if product.consumer == "down")
    assert (down.shape, down.dtype, down.x) == ((3, 6, 24), torch.float32, str(product.node.args[0]))


def test_a_hook_of_the_caller_sees_nothing():
    assert saved_by(lambda: savings(mlp, fake=True)) == []


@pytest.mark.parametrize("kind", [mlp, attention, stretches], ids=lambda kind: kind.__name__)
def test_the_graph_is_left_as_it_was(kind):
    module, gm = graph_of(kind, 3)
    before = graph_text(gm)
    saved_tensors(gm, [*state_of(module).values(), rows()])
    assert graph_text(gm) == before
