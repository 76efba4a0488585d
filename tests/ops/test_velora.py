"""What ``velora::compress`` and ``velora::linear`` promise, against float64 and dense PyTorch."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.allocator import peak_of
from tests.helpers.examples import for_any
from tests.helpers.gradients import saved_by
from velora_fx.ops import velora as ops
from velora_fx.ops.velora import compress, compress_reference, expand, linear

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LOW_PRECISION = (torch.bfloat16, torch.float16)
ALL = ("x", "weight", "bias", "carrier")


def sample(
    lead: tuple[int, ...] = (3, 5),
    groups: int = 6,
    size: int = 8,
    out: int = 10,
    dtype: torch.dtype = torch.float32,
    v_dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    seed: int = 0,
) -> SimpleNamespace:
    """x, weight, bias, carrier (leaves that want gradients), v with unit rows, and dy, an upstream gradient."""
    torch.manual_seed(seed)
    x = torch.randn(*lead, groups * size, dtype=torch.float64).to(dtype)
    if layout == "sliced":
        x = torch.cat((x, x), -1)[..., : groups * size]
    elif layout == "transposed":
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "swapped":
        x = x.transpose(0, -2).contiguous().transpose(0, -2) if len(lead) > 1 else x
    s = SimpleNamespace(
        x=x,
        weight=torch.randn(out, groups * size, dtype=torch.float64).to(dtype),
        bias=torch.randn(out, dtype=torch.float64).to(dtype),
        carrier=torch.zeros(out, groups, dtype=dtype),
        v=F.normalize(torch.randn(groups, size, dtype=torch.float64), dim=1).to(v_dtype),
        dy=torch.randn(*lead, out, dtype=torch.float64).to(dtype),
    )
    for tensor in (s.x, s.weight, s.bias, s.carrier):
        tensor.requires_grad_()
    return s


def velora(s: SimpleNamespace) -> Tensor:
    return linear(s.x, s.weight, s.bias, compress(s.x, s.v), s.v, s.carrier)


def gradients(y: Tensor, s: SimpleNamespace, names: tuple[str, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, [getattr(s, name) for name in names], s.dy.to(y.dtype))


def rebuilt(z: Tensor, v: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """x̂ as the paper has it: every projection times its row of v."""
    return (z.to(torch.promote_types(dtype, v.dtype)).unsqueeze(-1) * v).to(dtype).flatten(-2)


def rebuilt_weight_gradient(dy: Tensor, x_hat: Tensor) -> Tensor:
    """dW as the paper has it: the dense product with x̂."""
    return dy.reshape(-1, dy.shape[-1]).t() @ x_hat.reshape(-1, x_hat.shape[-1])


def error(a: Tensor, truth: Tensor) -> float:
    """The relative distance of a from the truth, in the 2-norm."""
    a, truth = a.detach().double(), truth.detach().double()
    return float((a - truth).norm() / truth.norm())


shapes = st.fixed_dictionaries(
    {
        "lead": st.lists(st.integers(0, 4), max_size=3).map(tuple),
        "groups": st.integers(1, 5),
        "size": st.integers(1, 9),
        "out": st.integers(1, 7),
        "layout": st.sampled_from(["contiguous", "sliced", "transposed", "swapped"]),
        "seed": st.integers(0, 99),
    }
)


@for_any(shapes, st.sampled_from(DTYPES), st.booleans(), st.booleans(), examples=40)
def test_forward_is_bit_equal_to_the_dense_linear(shape, dtype, with_bias, x_wants_gradient):
    s = sample(**shape, dtype=dtype)
    s.x.requires_grad_(x_wants_gradient)
    s.bias = s.bias if with_bias else None
    torch.testing.assert_close(velora(s), F.linear(s.x, s.weight, s.bias), rtol=0, atol=0)


def dx_and_dbias(s: SimpleNamespace) -> list[tuple[Tensor, ...]]:
    """Ours and the dense linear's."""
    return [gradients(y, s, ("x", "bias")) for y in (velora(s), F.linear(s.x, s.weight, s.bias))]


@for_any(shapes, examples=40)
def test_dx_and_dbias_equal_the_dense_ones(shape):
    torch.testing.assert_close(*dx_and_dbias(sample(**shape, dtype=torch.float64)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dx_and_dbias_are_bit_equal_on_contiguous_batches(dtype):
    torch.testing.assert_close(*dx_and_dbias(sample(dtype=dtype)), rtol=0, atol=0)


@for_any(shapes, examples=40)
def test_weight_gradient_is_the_one_of_the_rebuilt_input(shape):
    s = sample(**shape, dtype=torch.float64, v_dtype=torch.float64)
    (dweight,) = gradients(velora(s), s, ("weight",))
    truth = rebuilt_weight_gradient(s.dy, rebuilt(compress(s.x, s.v), s.v))
    torch.testing.assert_close(dweight, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [43, 127])
def test_a_prime_sub_token_size_that_divides_the_features_works(size):
    s = sample(groups=43 * 127 // size, size=size, dtype=torch.float64, v_dtype=torch.float64)
    (dweight,) = gradients(velora(s), s, ("weight",))
    assert error(dweight, rebuilt_weight_gradient(s.dy, rebuilt(compress(s.x, s.v), s.v))) < 1e-14


def test_a_vector_shared_by_all_groups_works_as_a_broadcast_view():
    s = sample()
    s.v = s.v[:1].expand(6, -1)
    (dweight,) = gradients(velora(s), s, ("weight",))
    assert error(dweight, rebuilt_weight_gradient(s.dy.double(), rebuilt(compress(s.x, s.v), s.v))) < 1e-6


@for_any(shapes, examples=40)
def test_carrier_gradient_times_v_is_the_weight_gradient(shape):
    s = sample(**shape, dtype=torch.float64, v_dtype=torch.float64)
    dweight, dcarrier = gradients(velora(s), s, ("weight", "carrier"))
    assert torch.equal((dcarrier.unsqueeze(-1) * s.v).flatten(1), dweight)


def test_the_carrier_has_no_part_in_the_forward_pass():
    s = sample()
    s.carrier = torch.full_like(s.carrier, torch.nan)
    assert torch.equal(velora(s), F.linear(s.x, s.weight, s.bias))


@for_any(shapes, st.sampled_from(DTYPES), st.sampled_from(DTYPES), examples=40)
def test_z_is_rounded_once_from_a_float32_or_better_sum(shape, dtype, v_dtype):
    s = sample(**shape, dtype=dtype, v_dtype=v_dtype)
    groups = s.x.detach().double().unflatten(-1, s.v.shape)
    truth = (groups * s.v.double()).sum(-1)
    magnitude = (groups * s.v.double()).abs().sum(-1)
    sum_error = 16 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for z in (compress(s.x, s.v), compress_reference(s.x.detach(), s.v)):
        assert z.dtype == dtype and z.shape == truth.shape
        rounding = torch.finfo(dtype).eps / 2 * truth.abs() + torch.finfo(dtype).smallest_normal
        assert ((z.double() - truth).abs() <= rounding * 1.01 + sum_error * magnitude).all()


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("size", [16, 32, 43])
def test_weight_gradient_in_low_precision_is_as_good_as_the_rebuilt_one(dtype, size):
    """The rival is the same-dtype eager computation with x̂ rebuilt from a float32 v; 5% for the luck of rounding."""
    s = sample(lead=(512,), groups=8, size=size, out=96, dtype=dtype)
    z = compress(s.x, s.v)
    truth = rebuilt_weight_gradient(s.dy.double(), rebuilt(z, s.v))
    (dweight,) = gradients(velora(s), s, ("weight",))
    assert error(dweight, truth) <= 1.05 * error(rebuilt_weight_gradient(s.dy, rebuilt(z, s.v, dtype)), truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v_dtype", DTYPES)
def test_every_gradient_has_the_dtype_and_shape_of_its_input(dtype, v_dtype):
    s = sample(dtype=dtype, v_dtype=v_dtype)
    for name, gradient in zip(ALL, gradients(velora(s), s, ALL), strict=True):
        assert (gradient.dtype, gradient.shape) == (dtype, getattr(s, name).shape)


def test_z_never_wants_a_gradient():
    s = sample()
    z = compress(s.x, s.v)
    assert not z.requires_grad
    assert not linear(s.x.detach(), s.weight.detach(), None, z, s.v, None).requires_grad


@pytest.mark.parametrize(
    ("wanted", "saved_names"),
    [
        ({"x", "weight", "bias", "carrier"}, {"weight", "z", "v"}),
        ({"x", "weight"}, {"weight", "z", "v"}),
        ({"weight"}, {"z", "v"}),
        ({"carrier"}, {"z"}),
        ({"x", "bias"}, {"weight"}),
        ({"bias"}, set()),
    ],
    ids=lambda names: "+".join(sorted(names)),
)
def test_only_what_the_wanted_gradients_need_is_saved(wanted, saved_names):
    s = sample()
    for name in ALL:
        getattr(s, name).requires_grad_(name in wanted)
    s.z = compress(s.x, s.v)
    saved = saved_by(lambda: linear(s.x, s.weight, s.bias, s.z, s.v, s.carrier))
    storages = {name: getattr(s, name).untyped_storage().data_ptr() for name in (*ALL, "z", "v")}
    assert {t.untyped_storage().data_ptr() for t in saved} == {storages[name] for name in saved_names}


def test_checkpointing_gives_the_same_gradients_and_saves_no_z():
    s = sample()

    def run() -> Tensor:
        return checkpoint(lambda x: velora(SimpleNamespace(**{**vars(s), "x": x})), s.x, use_reentrant=False)

    torch.testing.assert_close(gradients(run(), s, ALL), gradients(velora(s), s, ALL), rtol=0, atol=0)
    assert {t.shape for t in saved_by(run) if t.numel()} == {s.x.shape}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed", "swapped"])
def test_compress_on_cpu_makes_only_small_temporaries(dtype, layout):
    s = sample(lead=(4, 1024), groups=32, size=32, dtype=dtype, layout=layout)
    x = s.x.detach()
    z_bytes = 4 * 1024 * 32 * dtype.itemsize
    assert peak_of(lambda: compress(x, s.v)) - z_bytes < 600 * 2**10 < x.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_makes_no_second_tensor_of_the_weights_size(dtype):
    s = sample(lead=(64,), groups=32, size=32, out=1024, dtype=dtype)
    y = velora(s)
    backward = peak_of(lambda: torch.autograd.grad(y, s.weight, s.dy))
    assert backward < 1.2 * s.weight.nbytes


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_autocast_computes_what_the_dense_linear_does_and_returns_float32_gradients(dtype):
    s = sample()
    with torch.autocast("cpu", dtype):
        y, dense = velora(s), F.linear(s.x, s.weight, s.bias)
    assert y.dtype == dtype and torch.equal(y, dense)
    dx, dweight, dbias, dcarrier = gradients(y, s, ALL)
    assert {g.dtype for g in (dx, dweight, dbias, dcarrier)} == {torch.float32}
    dense_dx, dense_dbias = gradients(dense, s, ("x", "bias"))
    assert torch.equal(dx, dense_dx) and torch.equal(dbias, dense_dbias)
    dy, x_hat = s.dy.to(dtype), rebuilt(compress(s.x, s.v), s.v)
    assert error(dweight, rebuilt_weight_gradient(dy.double(), x_hat)) < torch.finfo(dtype).eps


def test_autocast_leaves_float64_alone():
    s = sample(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert velora(s).dtype == torch.float64


def test_autocast_leaves_z_and_v_alone():
    s = sample()
    z = compress(s.x, s.v)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compress(s.x, s.v), z)
        saved = saved_by(lambda: linear(s.x.detach(), s.weight, s.bias, z, s.v, s.carrier))
    assert {t.data_ptr() for t in saved} == {z.data_ptr(), s.v.data_ptr()}


def test_backward_inside_an_autocast_region_keeps_the_dtypes():
    s = sample()
    y = velora(s)
    with torch.autocast("cpu", torch.bfloat16):
        assert {g.dtype for g in gradients(y, s, ALL)} == {torch.float32}


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_opcheck_accepts_compress(layout):
    s = sample(layout=layout)
    torch.library.opcheck(torch.ops.velora.compress.default, (s.x, s.v))


@pytest.mark.parametrize("case", ["all", "frozen weight", "no bias", "carrier only"])
def test_opcheck_accepts_linear(case):
    s = sample(layout="swapped")
    s.weight.requires_grad_(case not in ("frozen weight", "carrier only"))
    bias = None if case == "no bias" else s.bias
    carrier = s.carrier if case in ("all", "carrier only") else None
    torch.library.opcheck(torch.ops.velora.linear.default, (s.x, s.weight, bias, compress(s.x, s.v), s.v, carrier))


def test_flops_are_counted_forward_and_backward():
    s = sample()
    rows, features, out, groups = 15, 48, 10, 6
    with FlopCounterMode(display=False) as forward:
        y = velora(s)
    with FlopCounterMode(display=False) as backward:
        gradients(y, s, ("x", "weight"))
    assert forward.get_total_flops() == 2 * rows * features + 2 * rows * features * out
    assert backward.get_total_flops() == 2 * rows * features * out + 2 * rows * groups * out


def operators(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def traced(s: SimpleNamespace, pre_dispatch: bool = False) -> list[str]:
    gm = make_fx(lambda x: velora(SimpleNamespace(**{**vars(s), "x": x})), pre_dispatch=pre_dispatch)(s.x)
    return operators(gm.graph)


def test_a_traced_graph_holds_one_node_for_each_operator():
    s = sample()
    for tensor in vars(s).values():
        tensor.requires_grad_(False)
    assert traced(s) == ["velora.compress.default", "velora.linear.default"]


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_a_graph_traced_from_real_tensors_that_want_gradients_holds_the_operators(pre_dispatch):
    assert {"velora.compress.default", "velora.linear.default"} <= set(traced(sample(), pre_dispatch))


class Block(torch.nn.Module):
    """A producer whose output autograd has no other reason to save, and a linear that reads it."""

    def __init__(self) -> None:
        super().__init__()
        s = sample()
        self.weight, self.bias, self.carrier = (torch.nn.Parameter(t) for t in (s.weight, s.bias, s.carrier))
        self.register_buffer("v", s.v)

    def forward(self, x: Tensor) -> Tensor:
        x = x.sin() + 1
        return linear(x, self.weight, self.bias, compress(x, self.v), self.v, self.carrier)


def test_torch_export_keeps_the_operators():
    exported = torch.export.export(Block(), (sample().x.detach(),), strict=False)
    assert operators(exported.graph)[-2:] == ["velora.compress.default", "velora.linear.default"]


@pytest.fixture(scope="module", params=[False, True], ids=["static", "dynamic"])
def compiled(request: pytest.FixtureRequest) -> SimpleNamespace:
    """One compiled training step beside the same step in eager; the cache is fresh, for its key knows no formula."""
    torch._dynamo.reset()
    module, s = Block(), sample()
    leaves = (s.x, *module.parameters())
    result = SimpleNamespace(x=s.x, saved=[])
    step = torch.compile(module, fullgraph=True, dynamic=request.param)

    def run() -> tuple[Tensor, ...]:
        outputs: list[Tensor] = []
        result.saved = saved_by(lambda: outputs.append(step(s.x)))  # type: ignore[return-value]
        return outputs[0], *torch.autograd.grad(outputs[0], leaves, s.dy)

    with fresh_cache():
        result.values, result.code = run_and_get_code(run)
    y = module(s.x)
    result.eager = (y, *torch.autograd.grad(y, leaves, s.dy))
    return result


def test_the_compiled_step_equals_the_eager_step(compiled):
    for ours, theirs in zip(compiled.values, compiled.eager, strict=True):
        assert error(ours, theirs) < 1e-6


def test_generated_code_holds_no_velora_operator(compiled):
    assert len(compiled.code) == 2
    assert not any("velora.compress" in code or "velora.linear" in code for code in compiled.code)


def test_the_compiled_forward_saves_no_activation_of_the_inputs_size_but_the_input(compiled):
    rows = 15
    large = [t for t in compiled.saved if t.numel() >= rows * 48]
    assert [t.data_ptr() for t in large] == [compiled.x.data_ptr()]


def test_a_compiled_linear_on_a_graph_input_saves_z_and_not_x():
    torch._dynamo.reset()
    s = sample()
    step = torch.compile(lambda x, weight, v: linear(x, weight, None, compress(x, v), v, None), fullgraph=True)
    with fresh_cache():
        saved = saved_by(lambda: step(s.x.detach(), s.weight, s.v))
    assert sorted(t.numel() for t in saved) == [s.v.numel(), 15 * 6]


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_autocast_works_compiled(dtype):
    torch._dynamo.reset()
    s = sample()

    def step(x: Tensor, weight: Tensor, bias: Tensor, v: Tensor, carrier: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return linear(x, weight, bias, compress(x, v), v, carrier)

    arguments = (s.x, s.weight, s.bias, s.v, s.carrier)
    with fresh_cache():
        y = torch.compile(step, fullgraph=True)(*arguments)
        ours = gradients(y, s, ALL)
    for a, b in zip((y, *ours), (eager := step(*arguments), *gradients(eager, s, ALL)), strict=True):
        assert a.dtype == b.dtype and error(a, b) < torch.finfo(dtype).eps


BAD_COMPRESS = {
    "a sub-token size that does not fit": lambda s: (s.x, s.v[:, 1:]),
    "a vector where a row per group is due": lambda s: (s.x, s.v[0]),
    "a scalar": lambda s: (s.x.sum(), s.v),
    "integers": lambda s: (s.x.long(), s.v),
    "eight bits": lambda s: (s.x.to(torch.float8_e4m3fn), s.v),
    "another device": lambda s: (s.x, s.v.to("meta")),
}
BAD_LINEAR = {
    "weight": lambda s: (s.x, s.weight[:, 1:], None, s.z, s.v, None),
    "bias": lambda s: (s.x, s.weight, s.bias[:1], s.z, s.v, None),
    "z": lambda s: (s.x, s.weight, None, s.z[1:], s.v, None),
    "carrier": lambda s: (s.x, s.weight, None, s.z, s.v, s.carrier[1:]),
    "x .* z of torch.int64": lambda s: (s.x, s.weight, None, s.z.long(), s.v, None),
    "x .* carrier of torch.int64": lambda s: (s.x, s.weight, None, s.z, s.v, s.carrier.long()),
    "x on cpu, weight on meta": lambda s: (s.x, s.weight.to("meta"), None, s.z, s.v, None),
    "x on cpu, .* z on meta": lambda s: (s.x, s.weight, None, s.z.to("meta"), s.v, None),
    "x on cpu, .* carrier on meta": lambda s: (s.x, s.weight, None, s.z, s.v, s.carrier.to("meta")),
}
BAD_EXPAND = {
    r"factor \[3, 4\] and v \[5, 2\]": lambda s: (torch.randn(3, 4), torch.randn(5, 2), False),
    r"factor of torch.int64, v of": lambda s: (torch.ones(3, 4).long(), torch.randn(4, 2), False),
    r"factor of .*, v of torch.int64": lambda s: (torch.randn(3, 4), torch.ones(4, 2).long(), False),
    r"factor on cpu, v on meta": lambda s: (torch.randn(3, 4), torch.randn(4, 2, device="meta"), False),
}


REFUSED = [
    *((compress, "compress: got .*", arguments) for arguments in BAD_COMPRESS.values()),
    *((linear, f"linear: got {message}", arguments) for message, arguments in BAD_LINEAR.items()),
    *((expand, f"expand: got {message}", arguments) for message, arguments in BAD_EXPAND.items()),
]


@pytest.mark.parametrize(("operator", "message", "arguments"), REFUSED)
@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
def test_operands_that_do_not_fit_are_refused_with_what_is_allowed(operator, message, arguments, fake):
    s = sample()
    s.z = compress(s.x, s.v)
    context = FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.no_grad()
    with context, pytest.raises(ValueError, match=f"velora::{message}.*; allowed: "):
        operator(*arguments(s))


def test_importing_the_operators_leaves_inductor_unimported():
    check = (
        "import sys, types; package = sys.modules['velora_fx'] = types.ModuleType('velora_fx'); "
        f"package.__path__ = [{str(Path(ops.__file__).parent)!r}]; import velora_fx.ops.velora; "
        "sys.exit('torch._inductor' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_the_gradient_of_a_transposed_weight_has_its_layout_and_takes_no_copy():
    """A Conv1D's weight is [D, O]; a gradient in another layout would be copied when it is kept."""
    s = sample(lead=(64,), groups=32, size=32, out=1024)
    stored = s.weight.detach().t().contiguous().requires_grad_()
    s.x.requires_grad_(False)
    y = linear(s.x, stored.t(), None, compress(s.x, s.v), s.v, None)
    peak = peak_of(lambda: y.backward(s.dy))
    plain = gradients(velora(s), s, ("weight",))[0]
    assert stored.grad.stride() == stored.stride() and torch.equal(stored.grad, plain.t())
    assert peak < 1.5 * stored.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v_dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_expand_is_the_outer_product_rounded_once(dtype, v_dtype, transposed):
    torch.manual_seed(0)
    factor, v = torch.randn(9, 6).to(dtype), torch.randn(6, 8).to(v_dtype)
    dweight = expand(factor, v, transposed)
    truth = (factor.double().unsqueeze(-1) * v.double()).flatten(1)
    assert (dweight.dtype, dweight.stride()) == (dtype, (1, 9) if transposed else (48, 1))
    assert ((dweight.double() - truth).abs() <= 0.51 * torch.finfo(dtype).eps * truth.abs()).all()


def test_opcheck_accepts_expand():
    torch.library.opcheck(torch.ops.velora.expand.default, (torch.randn(9, 6), torch.randn(6, 8), True))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("value", [0.5, 32**-0.5, 0.3, -0.3])
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_expand_of_infinity_is_infinity_whether_v_is_exact_in_low_precision_or_not(dtype, value, transposed):
    """GradScaler finds its scale by gradients that overflow."""
    factor, v = torch.tensor([[torch.inf, -torch.inf]], dtype=dtype), torch.full((2, 2), value)
    assert torch.equal(expand(factor, v, transposed), (factor.unsqueeze(-1) * v).to(dtype).flatten(1))


@pytest.mark.parametrize(
    "sizes", [{"out": 0}, {"lead": (0, 2)}, {"lead": (), "out": 0}, {"size": 0}, {"groups": 0}, {"groups": 0, "out": 0}]
)
def test_gradients_of_empty_tensors_are_the_dense_ones(sizes):
    s = sample(**{"lead": (3, 2), "groups": 2, "size": 4, "out": 5, **sizes})
    y, dense = velora(s), F.linear(s.x, s.weight, s.bias)
    ours, theirs = gradients(y, s, ALL), gradients(dense, s, ALL[:3])
    assert torch.equal(y, dense)
    for a, b in zip(ours, theirs, strict=False):
        torch.testing.assert_close(a, b)
    assert ours[3].shape == s.carrier.shape


def test_forward_mode_derivatives_are_refused_and_not_zero():
    s = sample()
    x, z = s.x.detach(), compress(s.x, s.v).detach()

    def layer(x: Tensor) -> Tensor:
        return linear(x, s.weight.detach(), None, z, s.v, None)

    with pytest.raises(NotImplementedError, match="velora::linear has no forward-mode derivative"):
        torch.func.jvp(layer, (x,), (x,))
    with forward_ad.dual_level():
        layer(x)  # nothing to differentiate
        with pytest.raises(NotImplementedError, match="velora::linear has no forward-mode derivative"):
            layer(forward_ad.make_dual(x, x))


def test_in_eager_mode_the_functions_are_the_operators_bit_for_bit():
    s = sample()
    z = torch.ops.velora.compress.default(s.x, s.v)
    operator = torch.ops.velora.linear.default(s.x, s.weight, s.bias, z, s.v, s.carrier)
    y = velora(s)
    assert y.grad_fn is not None and type(y.grad_fn) is not type(operator.grad_fn)
    assert torch.equal(compress(s.x, s.v), z) and torch.equal(y, operator)
    torch.testing.assert_close(gradients(y, s, ALL), gradients(operator, s, ALL), rtol=0, atol=0)
