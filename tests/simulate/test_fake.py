"""A fake copy is the model without its memory; fake operators have the shapes and savings of the real kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from tests.helpers.allocator import peak_of
from tests.helpers.examples import for_any
from tests.helpers.gradients import saved_by
from tests.helpers.zoo import ZOO
from velora_fx.ops.velora import compress
from velora_fx.simulate import Tracker, fake_copy, fake_mode, fake_tensor, kernels_of

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


# Grouped products: tokens sorted by expert against a stack of matrices, and what its gradients are made of.
OFFSETS = torch.tensor([3, 5, 8], dtype=torch.int32)
GROUPED: dict[str, tuple[tuple[int, ...], tuple[int, ...], Tensor | None]] = {
    "tokens by weights": ((8, 16), (3, 16, 24), OFFSETS),
    "tokens by tokens": ((16, 8), (8, 24), OFFSETS),
    "weights by tokens": ((3, 16, 24), (24, 8), OFFSETS),
    "a stack by a stack": ((3, 8, 16), (3, 16, 24), None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GROUPED)
def test_a_fake_grouped_product_has_the_shape_and_dtype_of_the_real_one(name, dtype):
    a_shape, b_shape, offsets = GROUPED[name]
    a, b, mode = torch.zeros(a_shape, dtype=dtype), torch.zeros(b_shape, dtype=dtype), fake_mode()
    real = torch._grouped_mm(a, b, offsets)
    with kernels_of(CPU):
        fake = torch._grouped_mm(fake_tensor(a, mode), fake_tensor(b, mode), offsets)
    assert isinstance(fake, FakeTensor)
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


def test_a_real_grouped_product_is_left_alone():
    a, b = torch.randn(8, 16), torch.randn(3, 16, 24)
    with kernels_of(CPU):
        inside = torch._grouped_mm(a, b, OFFSETS)
    assert torch.equal(inside, torch._grouped_mm(a, b, OFFSETS))


def bytes_of(run: Callable[..., Any], inputs: list[Tensor], device: torch.device = CPU) -> tuple[int, int, Any]:
    """The peak of a run on fake copies of the inputs and what it leaves, besides what they take, and its result."""
    fakes, tracker = fake_copy(inputs, fake_mode()), Tracker()
    held = sum(tracker.deltas[tracker.watch(tensor)] for tensor in fakes)
    with tracker, kernels_of(device):
        result = run(*fakes)
    live = tracker.timeline().live_bytes
    return int(live.max()) - held, int(live[-1]) - held, result


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded"])
def test_a_fake_layer_norm_gives_the_strides_and_takes_the_memory_of_the_real_one(layout):
    x = torch.zeros(32, 64, 256) if layout == "contiguous" else torch.zeros(64, 32, 256).transpose(0, 1)
    gradient = torch.ones(32, 1, 256).expand(32, 64, 256) if layout == "expanded" else torch.ones_like(x)
    norm, strides = nn.LayerNorm(256), []

    def step(inputs: list[Tensor]) -> None:
        x = inputs[0].requires_grad_()
        y = F.layer_norm(x, (256,), *inputs[2:])
        (dx,) = torch.autograd.grad(y, [x], inputs[1])
        strides.append((y.stride(), dx.stride()))

    inputs = [x, gradient, norm.weight, norm.bias]
    real_bytes = peak_of(lambda: step(inputs))
    fake_bytes, *_ = bytes_of(lambda *fakes: step([*fakes]), inputs)
    assert strides[0] == strides[1]
    buffers = 64 * 1024  # of the real kernel's threads
    assert real_bytes - buffers <= fake_bytes <= real_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(8, 16), (4096, 256), (16, 64, 384)], ids=str)
def test_a_fake_compression_takes_the_memory_of_the_real_one(shape, dtype):
    x, v = torch.zeros(shape, dtype=dtype), torch.ones(shape[-1] // 8, 8)
    peak, end, z = bytes_of(compress, [x, v])
    assert (z.shape, z.dtype) == ((*shape[:-1], shape[-1] // 8), dtype)
    assert (peak, end) == (peak_of(lambda: compress(x, v)), z.untyped_storage().nbytes())


def test_a_fake_compression_planned_for_a_gpu_takes_no_memory_but_its_result():
    peak, *_ = bytes_of(compress, [torch.zeros(64, 256), torch.ones(32, 8)], CUDA)
    assert peak == 64 * 32 * 4


def attention_inputs(dtype: torch.dtype = torch.float32, kv_heads: int = 4, key_length: int = 6) -> list[Tensor]:
    mode = fake_mode()
    shapes = ((2, 4, 6, 16), (2, kv_heads, key_length, 16), (2, kv_heads, key_length, 16))
    return [fake_tensor(torch.zeros(shape, dtype=dtype, requires_grad=True), mode) * 1 for shape in shapes]


def saved_by_attention(*inputs: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """The output, and what is saved of more than a random state's few numbers."""
    out: list[Tensor] = []
    with kernels_of(CUDA):
        saved = saved_by(lambda: out.append(F.scaled_dot_product_attention(*inputs, **options)))
    return out[0], [tensor for tensor in saved if tensor.numel() > 4]


@without_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"dropout_p": 0.1}], ids=str)
def test_attention_planned_for_a_gpu_saves_query_key_value_output_and_one_number_a_row(dtype, options):
    inputs = attention_inputs(dtype)
    out, saved = saved_by_attention(*inputs, **options)
    assert out.shape == inputs[0].shape and out.dtype == dtype
    *same_shape, logsumexp = sorted(saved, key=lambda tensor: -tensor.numel())
    assert [tensor.shape for tensor in same_shape] == [out.shape] * 4
    assert {tensor.untyped_storage()._cdata for tensor in same_shape} == {
        tensor.untyped_storage()._cdata for tensor in (*inputs, out)
    }
    assert logsumexp.dtype == torch.float32
    assert logsumexp.shape[:2] == (2, 4) and logsumexp.shape[2] in (6, 32)  # rows, padded to 32 by one of the kernels


@without_gpu
def test_attention_planned_for_a_gpu_never_saves_the_matrix_of_weights():
    _, saved = saved_by_attention(*attention_inputs(key_length=50), dropout_p=0.5)
    assert not any(tensor.shape[-2:] == (6, 50) for tensor in saved)


@without_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "mask",
    [torch.zeros(2, 1, 6, 9), torch.ones(1, 1, 6, 9, dtype=torch.bool), torch.ones(6, 9, dtype=torch.bool)],
    ids=lambda m: f"{m.dtype} {m.dim()}-D",
)
def test_attention_planned_for_a_gpu_takes_masks(mask, dtype):
    mask = mask.to(dtype) if mask.is_floating_point() else mask
    out, _ = saved_by_attention(*attention_inputs(dtype, key_length=9), attn_mask=fake_tensor(mask, fake_mode()))
    assert out.shape == (2, 4, 6, 16)


@without_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_planned_for_a_gpu_takes_grouped_queries(dtype):
    inputs = attention_inputs(dtype, kv_heads=2)
    out, _ = saved_by_attention(*inputs, enable_gqa=True)
    assert out.shape == (2, 4, 6, 16)
    gradients = torch.autograd.grad(out.sum(), inputs)
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in inputs]


@pytest.mark.parametrize("context", [contextlib.nullcontext, lambda: kernels_of(CPU)], ids=["plain", "kernels_of cpu"])
def test_attention_planned_for_the_cpu_is_the_cpus(context):
    mode = fake_mode()
    q, k, v = (fake_tensor(torch.zeros(2, 4, 6, 16, requires_grad=True), mode) for _ in range(3))
    with context():
        assert F.scaled_dot_product_attention(q, k, v).grad_fn.name() == (
            "ScaledDotProductFlashAttentionForCpuBackward0"
        )
