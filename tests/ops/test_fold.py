"""The operator that spreads the step of a carrier over its weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers.allocator import peak_of
from velora_fx.ops import fold
from velora_fx.simulate import fake_copy, fake_mode

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def sample(out: int, groups: int, size: int, dtype: torch.dtype, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    weight, carrier = torch.randn(out, groups * size).to(dtype), torch.randn(out, groups).to(dtype)
    if transposed:
        weight, carrier = weight.t().contiguous().t(), carrier.t().contiguous().t()
    return weight, carrier, torch.randn(groups, size).sign() / size**0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("out", "groups", "size"), [(5, 6, 8), (9, 3, 43), (700, 43, 127), (1, 1, 2)])
@pytest.mark.parametrize("keep", [1.0, 0.75])
def test_the_weight_is_decayed_and_takes_the_step_of_its_carrier(out, groups, size, dtype, transposed, keep):
    weight, carrier, v = sample(out, groups, size, dtype, transposed)
    kept, step = keep * weight.double(), (carrier.double().unsqueeze(-1) * v.double().sign()).flatten(1)
    strides = weight.stride()
    fold([weight], [carrier], [v], torch.tensor(keep, dtype=torch.float64))
    eps = torch.finfo(dtype).eps
    assert ((weight.double() - kept - step).abs() <= eps * (kept.abs() + (kept + step).abs() + 1e-300)).all()
    assert weight.stride() == strides and not carrier.any()


@pytest.mark.parametrize("keep", [torch.tensor([0.5]), torch.tensor(0.5, dtype=torch.float64)])
def test_keep_may_be_a_tensor_of_any_dtype_with_one_entry(keep):
    weight, carrier, v = sample(4, 2, 3, torch.float32, False)
    expected = weight / 2 + (carrier.unsqueeze(-1) * v.sign()).flatten(1)
    fold([weight], [carrier], [v], keep)
    torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_it_makes_only_small_temporaries(dtype, transposed):
    weight, carrier, v = sample(1024, 32, 32, dtype, transposed)
    assert peak_of(lambda: fold([weight], [carrier], [v], torch.tensor(0.5))) < weight.nbytes / 3


def test_fake_tensors_are_folded_without_memory():
    weight, carrier, v = sample(4, 2, 3, torch.float32, False)
    mode = fake_mode()
    fakes = fake_copy([weight, carrier], mode)
    assert peak_of(lambda: fold(fakes[:1], fakes[1:], [v], torch.tensor(1.0))) < weight.nbytes


@pytest.mark.parametrize(
    ("weight", "carrier", "v", "keep"),
    [
        ((4, 6), (4, 3), (2, 3), ()),
        ((4, 6), (5, 2), (2, 3), ()),
        ((4, 6), (4, 2), (2, 3), (2,)),
        ((6,), (1,), (2, 3), ()),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_what_is_allowed(weight, carrier, v, keep):
    with pytest.raises(ValueError, match=r"velora::fold: got .*; allowed: "):
        fold([torch.zeros(weight)], [torch.zeros(carrier)], [torch.ones(v)], torch.ones(keep))
