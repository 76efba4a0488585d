"""Fake operators take the memory, and return and save what the real kernels of their device do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.allocator import peak_of
from tests.helpers.gradients import saved_by
from velora_fx.devices import device_rates
from velora_fx.ops.velora import compress
from velora_fx.simulate import StepTimer, Tracker, fake_copy, fake_mode, fake_tensor, kernels_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="real CUDA attention is used then")


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


class Seen(TorchDispatchMode):
    """The names of the operators that come by."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def training_step(x: Tensor, weight: Tensor) -> None:
    F.layer_norm((x @ weight).relu().transpose(0, 1), (x.shape[0],)).sum().backward()


def fake_operands() -> tuple[Tensor, Tensor]:
    return fake_copy((torch.zeros(6, 8), torch.zeros(8, 4, requires_grad=True)), fake_mode())


def test_observers_see_the_events_and_the_time_that_modes_of_their_own_would_see():
    found = []
    for as_modes in (True, False):
        tracker, timer = Tracker(), StepTimer(device_rates(CPU))
        operands = fake_operands()
        if as_modes:
            with timer, tracker, kernels_of(CPU):
                training_step(*operands)
        else:
            with kernels_of(CPU, timer, tracker):
                training_step(*operands)
        found.append(([*tracker.deltas], [str(label) for label in tracker.timeline().labels], timer.seconds))
    assert found[0] == found[1]
    assert len(found[0][0]) > 10 and found[0][2] > 0


def test_a_mode_around_the_kernels_still_sees_every_operator():
    """Also the copies that a kernel makes beside its own."""
    with Seen() as outer, kernels_of(CPU):
        training_step(*fake_operands())
    assert {"aten.mm.default", "aten.native_layer_norm.default", "aten.contiguous.default"} <= set(outer.names)


def test_a_tensor_says_the_device_that_is_planned_for_in_backward_too():
    devices = []
    x, weight = fake_operands()
    y = x @ weight
    y.register_hook(lambda gradient: devices.append(gradient.device))
    with kernels_of(CPU):
        assert isinstance(y, FakeTensor)
        y.sum().backward()
    assert devices == [CPU] and weight.grad.device == CPU
