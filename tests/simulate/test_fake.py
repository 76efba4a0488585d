"""A fake copy is the model without its memory; fake operators have the shapes and savings of the real kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from tests.helpers.allocator import peak_of
from tests.helpers.examples import for_any
from tests.helpers.zoo import ZOO
from velora_fx.simulate import fake_copy, fake_mode, fake_tensor, kernels_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="real CUDA attention is used then")


class Odd(nn.Module):
    """Tied, frozen and transposed parameters, buffers of both kinds, and tensors that are plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
        self.transposed = nn.Parameter(torch.zeros(6, 3).t())
        self.low = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("positions", torch.arange(5), persistent=False)
        self.register_buffer("nothing", None)
        self.table = torch.randn(7)
        self.settings = {"window": 3, "bias": torch.randn(5)}
        self.again = self.scale


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    parameters, buffers = module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    return {**dict(parameters), **dict(buffers)}


def test_every_floating_tensor_is_fake_and_looks_the_same():
    model = Odd()
    fake = fake_copy(model, fake_mode())
    for name, copied in tensors_of(fake).items():
        original = tensors_of(model)[name]
        assert isinstance(copied, FakeTensor) == original.is_floating_point()
        for attribute in ("shape", "dtype", "device", "requires_grad", "is_leaf"):
            assert getattr(copied, attribute) == getattr(original, attribute), (name, attribute)
        assert copied.stride() == original.stride()


def test_parameters_stay_parameters_under_their_names_with_what_they_carry_as_attributes():
    model = Odd()
    model.frozen.lr_scale = 0.5
    fake = fake_copy(model, fake_mode())
    assert [name for name, _ in fake.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert all(isinstance(parameter, nn.Parameter) for parameter in fake.parameters())
    assert fake.frozen.lr_scale == 0.5


def test_ties_stay_ties():
    fake = fake_copy(Odd(), fake_mode())
    assert fake.head.weight is fake.embed.weight
    assert fake.again is fake.scale


def test_integers_are_real_copies():
    model = Odd()
    fake = fake_copy(model, fake_mode())
    assert torch.equal(fake.positions, model.positions)
    fake.positions.add_(1)
    assert torch.equal(model.positions, torch.arange(5))


def test_tensors_in_plain_attributes_lists_and_dicts_of_a_module_are_fake_too():
    """A non-leaf in a list is what collecting auxiliary losses leaves there; it cannot be deep-copied."""
    model = Odd()
    model.losses = [model.head.weight.sum()]
    fake = fake_copy(model, fake_mode())
    assert all(isinstance(tensor, FakeTensor) for tensor in (fake.table, fake.losses[0], fake.settings["bias"]))
    assert fake.settings["window"] == 3


def test_the_original_is_left_alone():
    model = Odd()
    before = {name: (id(tensor), tensor._version) for name, tensor in tensors_of(model).items()}
    attributes = {name: id(value) for name, value in vars(model).items()}
    fake_copy(model, fake_mode())
    assert {name: (id(tensor), tensor._version) for name, tensor in tensors_of(model).items()} == before
    assert {name: id(value) for name, value in vars(model).items()} == attributes


def test_training_mode_of_every_module_is_kept():
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2))
    model[0].eval()
    assert [module.training for module in fake_copy(model, fake_mode()).modules()] == [True, False, True]


def test_a_copy_takes_no_memory():
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4)))
    assert peak_of(lambda: fake_copy(model, fake_mode())) < 10_000  # 4 MiB of weights


def test_a_fake_step_computes_nothing():
    model, x = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4))), torch.randn(512, 512)

    def step() -> None:
        mode = fake_mode()
        fake_copy(model, mode)(fake_copy(x, mode)).sum().backward()

    assert peak_of(step) < 10_000


def test_a_model_on_the_meta_device_is_copied_to_a_real_one():
    fake = fake_copy(nn.Linear(4, 4, device="meta"), fake_mode())
    assert fake.weight.device == CPU and isinstance(fake.weight, FakeTensor)


@without_gpu
def test_a_copy_for_a_gpu_that_is_not_there_lies_on_the_cpu():
    assert fake_copy(nn.Linear(4, 4), fake_mode(), CUDA).weight.device == CPU


def test_arguments_are_copied_whatever_they_are_nested_in():
    x, ids = torch.randn(2, 3, requires_grad=True), torch.tensor([1, 2])
    args, kwargs = fake_copy(((x, [x, None]), {"ids": ids, "state": {"x": x}, "flag": True}), fake_mode())
    assert isinstance(args[0], FakeTensor) and args[0].requires_grad
    assert args[0] is args[1][0] is kwargs["state"]["x"]
    assert torch.equal(kwargs["ids"], ids) and kwargs["ids"] is not ids
    assert args[1][1] is None and kwargs["flag"] is True


def test_a_branch_on_the_values_of_a_mask_goes_the_way_of_a_real_run():
    mask = fake_copy(torch.tensor([[1, 1, 0]]), fake_mode())
    assert not bool(mask.all())


def test_a_view_of_an_argument_holds_all_of_its_storage():
    fake = fake_tensor(torch.zeros(10, 4)[2:4, 1:], fake_mode())
    assert (fake.shape, fake.stride(), fake.storage_offset()) == ((2, 3), (4, 1), 9)
    assert fake.untyped_storage().nbytes() == 10 * 4 * 4


@for_any(
    st.lists(st.integers(0, 4), max_size=3),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.complex64, torch.int64, torch.bool]),
    examples=60,
)
def test_a_fake_tensor_looks_like_the_real_one(shape, transposed, dtype):
    tensor = torch.zeros(shape, dtype=dtype)
    tensor = tensor.transpose(0, -1) if transposed and shape else tensor
    fake = fake_tensor(tensor, fake_mode())
    assert (fake.shape, fake.stride(), fake.dtype) == (tensor.shape, tensor.stride(), dtype)
    assert fake.untyped_storage().nbytes() == tensor.untyped_storage().nbytes()


@pytest.mark.parametrize("case", [case for case in ZOO if case.name in ("llama", "t5", "mixtral")], ids=str)
def test_a_fake_forward_gives_the_real_shapes(case):
    model, batch = case.build(), case.batch(*case.shapes[0])
    mode = fake_mode()
    with kernels_of(CPU):
        fake = fake_copy(model, mode)(**fake_copy(batch, mode))
    real = model(**batch)
    assert {name: value.shape for name, value in fake.items() if isinstance(value, Tensor)} == {
        name: value.shape for name, value in real.items() if isinstance(value, Tensor)
    }
