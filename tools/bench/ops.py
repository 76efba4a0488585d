"""`tools/bench ops`: the operators against a copy of the same bytes, plain ATen, dense products and PEFT's VeLoRA."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import TypeAlias

import torch
from torch import Tensor

from tools.bench.results import reason_of
from tools.bench.timing import Timing, copies_to_rotate, time_copy, timed_in_turn
from velora_fx.ops import fold, sign_projection
from velora_fx.ops import velora as ops

Calls: TypeAlias = list[Callable[..., object]]

OPERATORS = ("compress", "expand", "fold", "dW")
KEPT = 0.999  # what decay leaves of a weight
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}
REPEATS = {("cpu", True): 5, ("cpu", False): 20, ("cuda", True): 20, ("cuda", False): 100}


@dataclass(frozen=True)
class OpCase:
    """Sizes and dtype: x [rows, width], dY [rows, out], v [width / sub_token_size, sub_token_size]."""

    rows: int
    width: int
    out: int
    dtype: str
    sub_token_size: int

    @property
    def groups(self) -> int:
        """Sub-tokens of a row."""
        return self.width // self.sub_token_size

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return torch_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class OpRow:
    """One operator at one size, beside what it is compared with.

    `bytes` are those it has to read and write. For compress, expand and fold `plain` is the ATen expression; for dW
    `product` is the part dYᵀ z, `dense` is dYᵀ x, `rebuilt` the product with x̂ made again, as `rebuilt_by` does it,
    `fused` all in one kernel, cut as `fused_by` says, the fastest of several. `copy` moves the same bytes.
    """

    operator: str
    device: str
    case: OpCase
    bandwidth: float
    repeats: int
    bytes: int = 0
    ours: Timing | None = None
    copy: Timing | None = None
    plain: Timing | None = None
    product: Timing | None = None
    dense: Timing | None = None
    rebuilt: Timing | None = None
    rebuilt_by: str | None = None
    fused: Timing | None = None
    fused_by: str | None = None
    error: str | None = None

    def __str__(self) -> str:
        return f"{self.operator}, {self.case.rows} x {self.case.width}, M = {self.case.sub_token_size}"

    @property
    def bound_seconds(self) -> float | None:
        """What dW takes at best: the product at 1/M of the dense one's time or the reading of dY and z, then a write.

        None for the other operators.
        """
        if self.operator != "dW" or self.dense is None:
            return None
        case = self.case
        read_bytes = case.rows * (case.out + case.groups) * case.itemsize
        product = max(self.dense.median_seconds / case.sub_token_size, read_bytes / self.bandwidth)
        return product + case.out * case.width * case.itemsize / self.bandwidth

    @property
    def share(self) -> float | None:
        """The operator's bytes a second over those of a large copy; 1 is as fast as memory is."""
        return None if self.ours is None else self.bytes / self.ours.median_seconds / self.bandwidth

    @property
    def to_bound(self) -> float | None:
        """dW's time over its bound; 1 is best."""
        bound = self.bound_seconds
        return None if bound is None or self.ours is None else self.ours.median_seconds / bound


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a name."""
    found: torch.dtype = getattr(torch, name)
    return found


def op_cases(device: str, quick: bool) -> list[OpCase]:
    """The sizes that are measured on a device."""
    sizes = (16, 32, 64, 128)
    shapes: dict[tuple[int, int, int], tuple[int, ...]] = {
        (16384, 4096, 4096): (2, 8, *sizes),
        (16384, 11008, 4096): sizes,
        (8192, 2048, 2048): sizes,
        (8192, 5461, 2048): (43, 127),
    }
    if device == "cpu":
        shapes = {(1024, 768, 768): (32,), (1024, 2048, 2048): (32,)}
    wanted = (32, 43) if quick else (*sizes, 2, 8, 43, 127)
    return [
        OpCase(*shape, dtype, size)
        for shape, offered in shapes.items()
        for dtype in DTYPES[device]
        for size in offered
        if size in wanted and shape[1] % size == 0
    ]


def measure_op(row: OpRow) -> OpRow:
    """The row with its timings, or with the reason why there are none."""
    try:
        return {"compress": _compress, "expand": _expand, "fold": _fold, "dW": _weight_gradient}[row.operator](row)
    except Exception as error:
        return replace(row, error=reason_of(error))
    finally:
        gc.collect()
        if row.device == "cuda":
            torch.cuda.empty_cache()


def projection_of(case: OpCase, device: str) -> Tensor:
    """The projection of a case, as a plan makes it."""
    return sign_projection(0, "bench", "x", case.groups, case.sub_token_size).to(device)


def plain_expand(factor: Tensor, v: Tensor) -> Tensor:
    """`ops.expand` in plain ATen: the product in float32, rounded once."""
    return (factor.unsqueeze(-1) * v).flatten(1).to(factor.dtype)


def plain_fold(weight: Tensor, carrier: Tensor, v: Tensor) -> Tensor:
    """`fold` in plain ATen."""
    step = (carrier.unsqueeze(-1) * v.sign().to(carrier.dtype)).flatten(1)
    carrier.zero_()
    return weight.mul_(KEPT).add_(step)


def _compress(row: OpRow) -> OpRow:
    case, v = row.case, projection_of(row.case, row.device)
    num_bytes = case.rows * (case.width + case.groups) * case.itemsize
    inputs = _rotated(row, num_bytes, (case.rows, case.width))
    calls: Calls = [lambda x: ops.compress(x, v), lambda x: ops.compress_reference(x, v)]
    ours, plain = _time(row, calls, inputs)
    return replace(row, bytes=num_bytes, ours=ours, plain=plain, copy=time_copy(num_bytes, row.device, row.repeats))


def _expand(row: OpRow) -> OpRow:
    case, v = row.case, projection_of(row.case, row.device)
    num_bytes = case.out * (case.width + case.groups) * case.itemsize
    inputs = _rotated(row, case.out * case.groups * case.itemsize, (case.out, case.groups))
    calls: Calls = [lambda factor: ops.expand(factor, v, False), lambda factor: plain_expand(factor, v)]
    ours, plain = _time(row, calls, inputs)
    return replace(row, bytes=num_bytes, ours=ours, plain=plain, copy=time_copy(num_bytes, row.device, row.repeats))


def _fold(row: OpRow) -> OpRow:
    """The carriers are read as they are; that each call leaves zeros in them changes nothing about its time."""
    case, v = row.case, projection_of(row.case, row.device)
    num_bytes = 2 * case.out * (case.width + case.groups) * case.itemsize
    inputs = _rotated(row, num_bytes, (case.out, case.width), (case.out, case.groups))
    keep = torch.tensor(KEPT, dtype=torch.float64)

    def ours(weight: Tensor, carrier: Tensor) -> Tensor:
        fold([weight], [carrier], [v], keep)
        return weight

    calls: Calls = [ours, lambda weight, carrier: plain_fold(weight, carrier, v)]
    own, plain = _time(row, calls, inputs)
    return replace(row, bytes=num_bytes, ours=own, plain=plain, copy=time_copy(num_bytes, row.device, row.repeats))


def _weight_gradient(row: OpRow) -> OpRow:
    case, v = row.case, projection_of(row.case, row.device)
    read_bytes = case.rows * (case.out + case.groups) * case.itemsize
    inputs = _rotated(row, read_bytes, (case.rows, case.out), (case.rows, case.groups))
    rebuilt_by, rebuild = _rebuild(row, v)
    calls: Calls = [lambda dy, z: ops.expand(dy.t() @ z, v, False), lambda dy, z: dy.t() @ z, rebuild]
    contenders = fused_contenders(row.device)
    calls += [partial(contender, v=v) for contender in contenders.values()]
    ours, product, rebuilt, *fused = _time(row, calls, inputs)
    best = min(zip(fused, contenders, strict=True), key=lambda each: each[0].median_seconds, default=(None, None))
    del inputs
    dense_bytes = case.rows * (case.out + case.width) * case.itemsize
    inputs = _rotated(row, dense_bytes, (case.rows, case.out), (case.rows, case.width))
    (dense,) = _time(row, [lambda dy, x: dy.t() @ x], inputs)
    num_bytes = read_bytes + case.out * case.width * case.itemsize
    row = replace(row, bytes=num_bytes, ours=ours, product=product, dense=dense)
    return replace(row, rebuilt=rebuilt, rebuilt_by=rebuilt_by, fused=best[0], fused_by=best[1])


def fused_contenders(device: str) -> dict[str, Callable[..., Tensor]]:
    """Kernels that make dW of dY, z and v at once, by how they cut it; none where Triton has no device."""
    if device != "cuda" or find_spec("triton") is None:
        return {}
    from tools.bench.fused_gradient import CONTENDERS, weight_gradient

    return {str(tiles): partial(weight_gradient, tiles=tiles) for tiles in CONTENDERS}


def _rebuild(row: OpRow, v: Tensor) -> tuple[str, Callable[..., object]]:
    """PEFT's own backward, or a stand-in by another name where PEFT's VeLoRA is missing."""
    case = row.case
    try:
        from peft.tuners.lora.velora import VeloraFunction
    except ImportError:  # of PEFT, an older one or transformers
        return "x̂ rebuilt (no PEFT here)", lambda dy, z: dy.t() @ (z[..., None] * v.to(z.dtype)).flatten(-2)
    weight = torch.empty(case.out, case.width, dtype=torch_dtype(case.dtype), device=row.device)
    return "PEFT", lambda dy, z: VeloraFunction.backward(_PeftContext(case, z, weight, v[0]), dy)


class _PeftContext:
    """What PEFT's backward finds in autograd's context where the weight alone wants a gradient."""

    needs_input_grad = (False, True, False, False, False, False)
    velora_scale = 1.0

    def __init__(self, case: OpCase, z: Tensor, weight: Tensor, embed: Tensor) -> None:
        self.saved_tensors = (z, weight, embed)
        self.in_features = case.width


def _rotated(row: OpRow, num_bytes: int, *shapes: tuple[int, int]) -> list[tuple[Tensor, ...]]:
    """Random inputs, as many copies as are needed for none to be in the cache."""
    generator = torch.Generator(row.device).manual_seed(0)
    return [
        tuple(
            torch.randn(shape, generator=generator, device=row.device).to(torch_dtype(row.case.dtype))
            for shape in shapes
        )
        for _ in range(copies_to_rotate(num_bytes, row.device))
    ]


def _time(row: OpRow, contenders: Calls, inputs: list[tuple[Tensor, ...]]) -> list[Timing]:
    """Times the contenders; the last results are kept, lest the next be written to memory that is cached."""
    result = contenders[0](*inputs[0])
    assert isinstance(result, Tensor)
    kept: deque[object] = deque(maxlen=copies_to_rotate(result.nbytes, row.device))

    def call(contender: Callable[..., object], taken: tuple[Tensor, ...]) -> None:
        kept.append(contender(*taken))

    calls = [[partial(call, contender, taken) for taken in inputs] for contender in contenders]
    return timed_in_turn(calls, row.device, row.repeats)
