"""Capture turns a forward into a graph of its live state and inputs, runs nothing, and leaves the module as it was."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import random
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.helpers.allocator import peak_of
from tests.helpers.examples import for_any
from tests.helpers.gradients import saved_by
from tests.helpers.graph_text import graph_text, operations
from tests.helpers.toys import Of
from velora_fx.capture import Call, CaptureError, RegionGraph, find_graph, flatten, key_of, make_graph, state_of
from velora_fx.capture.export import capture

WIDTH = 8
kernel_runs: list[int] = []


@torch.library.custom_op("velora_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    kernel_runs.append(x.shape[0])
    return x * 2


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


doubled.register_autograd(lambda ctx, gradient: gradient * 2)


def of(function: Callable[..., Any], **parts: Any) -> Of:
    torch.manual_seed(0)
    return Of(function, linear=nn.Linear(WIDTH, WIDTH), dropout=nn.Dropout(0.5), **parts)


def rows(*lead: int, requires_grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(sum(lead))
    return torch.randn(*(lead or (3, 5)), WIDTH, generator=generator, requires_grad=requires_grad)


def graph_of(module: nn.Module, *args: Any, **kwargs: Any) -> RegionGraph:
    graph = make_graph(call := call_of(module, args, kwargs), key_of(call))
    assert graph.gm is not None, graph.reason
    return graph


def call_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    structure, leaves = flatten((args, kwargs))
    return Call(module, args, kwargs, structure, leaves, state_of(module))


def run(graph: RegionGraph, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The graph's result for another call of the module."""
    assert graph.gm is not None
    return graph.result(graph.gm(*call_of(module, args, kwargs).tensors))


def fits(graph: RegionGraph, module: nn.Module, *args: Any, **kwargs: Any) -> bool:
    return bool(graph.fits(call_of(module, args, kwargs).tensors))


def simple(m: Of, x: Tensor) -> Tensor:
    return m.dropout(m.linear(x).relu())


def failing(m: Of, x: Tensor) -> Tensor:
    m.linear(x)
    raise RuntimeError("a bug in the forward")


def everything(module: nn.Module) -> dict[str, Any]:
    """Identities, versions and plain values of all that a module tree and its classes consist of."""
    found: dict[str, Any] = {}
    for name, child in module.named_modules():
        classes = [(class_, dict(vars(class_))) for class_ in type(child).__mro__]
        found[name] = (type(child), child.training, child.__class__, sorted(vars(child)), classes)
        for attribute, value in vars(child).items():
            found[f"{name}.{attribute}"] = (id(value), copy.copy(value) if type(value) in (list, dict) else None)
    for name, tensor in state_of(module).items():
        found[f"{name}!"] = (id(tensor), tensor._version, tensor.requires_grad, tensor.grad, tensor.data_ptr())
    return found


@pytest.mark.parametrize("function", [simple, failing], ids=lambda function: function.__name__)
def test_the_module_and_its_classes_are_left_as_they_were(function):
    """Reads are recorded by a change of the classes for a while."""
    module = of(function)
    module.dropout.eval()
    before = everything(module)
    try:
        capture(module, (rows(),), {})
    except CaptureError:
        assert function is failing
    assert everything(module) == before


@pytest.mark.parametrize("function", [simple, failing], ids=lambda function: function.__name__)
def test_a_forward_that_stands_in_for_the_modules_own_is_not_captured_and_stays(function):
    module = of(function)
    stand_in = module.forward = lambda x: x * 100
    try:
        assert "mul" not in operations(capture(module, (rows(),), {}).gm)
    except CaptureError:
        assert function is failing
    assert module.forward is stand_in


def test_another_forward_can_be_captured():
    module = of(simple)
    gm = capture(module, (rows(),), {}, forward=lambda x: module.linear(x) * 3).gm
    assert operations(gm) == {"linear": 1, "mul": 1}
    assert "forward" not in vars(module)


class Remembering(nn.Module):
    """Leaves something behind in its forward, as mixtures of experts do with their auxiliary losses."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.how, self.calls, self.last = how, 0, None
        self.history: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.how == "a counter":
            self.calls += 1
        if self.how == "a tensor":
            self.last = y
        if self.how == "a list":
            self.history.append(y)
        if self.how == "a new attribute":
            self.loss = y.sum()
        return y


@pytest.mark.parametrize("how", ["a counter", "a tensor", "a list", "a new attribute"])
def test_a_forward_that_leaves_something_behind_is_refused_and_what_it_left_removed(how):
    """A graph would not do it at the next call."""
    module = Remembering(how)
    before = everything(module)
    with pytest.raises(CaptureError, match="sets the attribute"):
        capture(module, (rows(),), {})
    assert everything(module) == before


def remembers_in_an_object(m: Of, x: Tensor) -> Tensor:
    y = m.linear(x)
    m.context.losses.append(y.mean())
    return y


def test_a_list_inside_an_object_that_the_forward_appends_to_is_refused_and_restored():
    module = of(remembers_in_an_object, context=SimpleNamespace(losses=[]))
    with pytest.raises(CaptureError, match="context"):
        capture(module, (rows(),), {})
    assert module.context.losses == []


def test_a_forward_that_sets_an_attribute_to_what_it_is_can_be_captured():
    def settled(m: Of, x: Tensor) -> Tensor:
        m.window = int(m.window)
        return m.linear(x)

    capture(of(settled, window=1000), (rows(),), {})


def test_no_kernel_runs():
    kernel_runs.clear()
    gm = capture(of(lambda m, x: doubled(m.linear(x))), (rows(),), {}).gm
    assert operations(gm)["velora_tests.doubled"] == 1
    assert kernel_runs == []


def test_no_memory_of_the_modules_size_is_taken():
    module = nn.Sequential(nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 512))
    x = torch.zeros(512, 512)
    assert peak_of(lambda: capture(module, (x,), {})) < x.nbytes / 4


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_forward_was_called_with_is_let_go_at_once(fails):
    """Not when Python next collects cycles: activations would wait for it, in training and in simulated steps."""

    def forward(m, x):
        if fails:
            raise ValueError
        return m.linear(x)

    module, x = of(forward), rows()
    seen = weakref.ref(x)
    gc.disable()
    try:
        with contextlib.suppress(CaptureError):
            capture(module, (x,), {})
        del x
        assert seen() is None
    finally:
        gc.enable()


def test_the_random_state_is_untouched():
    module = of(simple)
    before = torch.get_rng_state()
    capture(module, (rows(),), {})
    assert torch.equal(torch.get_rng_state(), before)


DRAWS: dict[str, tuple[Callable[[Of, Tensor], Tensor], str]] = {
    "random": (lambda m, x: m.linear(x) * random.random(), "random"),
    "numpy": (lambda m, x: m.linear(x) * np.random.rand(), "random"),
    "shuffle": (lambda m, x: m.linear(x) * (random.shuffle([1, 2, 3]) or 1.0), "random"),
    "both before it fails": (lambda m, x: failing(m, x * random.random() * np.random.rand()), "a bug in the"),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_forward_that_draws_from_another_generator_is_refused_and_the_generator_left_as_it_was(name):
    function, reason = DRAWS[name]
    state, numpy_state = random.getstate(), np.random.get_state()
    with pytest.raises(CaptureError, match=reason):
        capture(of(function), (rows(),), {})
    assert random.getstate() == state
    for now, before in zip(np.random.get_state(), numpy_state, strict=True):
        assert np.array_equal(now, before)


class Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_and_saved_tensor_hooks_of_the_caller_see_nothing():
    mode, module, x = Recording(), of(simple), rows()
    with mode:
        assert saved_by(lambda: capture(module, (x,), {})) == []
    assert mode.seen == []


def test_grad_mode_and_autocast_of_the_caller_stay_out_of_the_graph():
    module, x = of(simple), rows()
    plain = graph_text(capture(module, (x,), {}).gm)
    with torch.no_grad():
        assert graph_text(capture(module, (x,), {}).gm) == plain
    with torch.autocast("cpu", torch.bfloat16):
        without_dtypes = graph_text(capture(module, (x,), {}).gm).replace("bf16", "f32")
    assert without_dtypes == plain


def test_hooks_on_the_module_stay_outside_of_the_graph():
    module = nn.Linear(WIDTH, WIDTH)
    seen: list[Any] = []
    module.register_forward_hook(lambda *args: seen.append(args))
    module.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    assert operations(capture(module, (rows(),), {}).gm) == {"linear": 1}
    assert seen == []


# What a graph computes.


def test_parameters_and_buffers_are_the_first_inputs_under_their_names():
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    gm = capture(module, (rows(4),), {}).gm
    inputs = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    assert list(gm.meta["state"]) == inputs[:-1]
    assert list(gm.meta["state"].values()) == list(state_of(module))


def test_the_graph_reads_the_state_that_it_is_called_with():
    module, x = of(lambda m, x: m.linear(x)), rows()
    graph = graph_of(module, x)
    with torch.no_grad():
        module.linear.weight.add_(1)
    module.linear.bias = nn.Parameter(torch.ones(WIDTH))
    assert torch.equal(run(graph, module, x), module(x))


def test_running_statistics_are_updated_as_in_eager():
    graph_module, eager = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)) for _ in range(2))
    eager.load_state_dict(graph_module.state_dict())
    graph = graph_of(graph_module, rows(4))
    assert graph_module[1].num_batches_tracked == 0
    for count in (4, 7):
        assert torch.equal(run(graph, graph_module, rows(count)), eager(rows(count)))
    for name, buffer in eager.named_buffers():
        assert torch.equal(dict(graph_module.named_buffers())[name], buffer), name


def test_an_argument_that_the_forward_changes_in_place_is_changed():
    module = of(lambda m, x: m.linear(x.add_(1)))
    graph = graph_of(module, rows(4, requires_grad=False))
    ours, eager = rows(6, requires_grad=False), rows(6, requires_grad=False)
    assert torch.equal(run(graph, module, ours), module(eager))
    assert torch.equal(ours, eager)


def test_tied_weights_are_one_input_and_get_the_sum_of_both_gradients():
    module = of(lambda m, x: m.other(m.linear(x).tanh()), other=nn.Linear(WIDTH, WIDTH))
    module.other.weight = module.linear.weight
    graph, x = graph_of(module, rows()), rows(2, 4)
    assert list(graph.gm.meta["state"].values()) == ["linear.weight", "linear.bias", "other.bias"]
    ours, eager = run(graph, module, x), module(x)
    assert torch.equal(ours, eager)
    gradients = [torch.autograd.grad(y.sum(), list(module.parameters())) for y in (ours, eager)]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def self_or_cross(m: Of, x: Tensor, context: Tensor) -> Tensor:
    return m.linear(x) if context is x else m.linear(x) * context


def test_one_tensor_passed_twice_is_the_same_to_the_forward():
    module, x, other = of(self_or_cross), rows(4), rows(4) + 1
    assert torch.equal(run(graph_of(module, x, x), module, other, other), module(other, other))
    assert torch.equal(run(graph_of(module, x, other), module, other, x), module(other, x))


def test_a_graph_for_one_tensor_passed_twice_does_not_stand_for_two_tensors():
    module, x, other = of(self_or_cross), rows(4), rows(4) + 1
    twice, apart = (key_of(call_of(module, args, {})) for args in ((x, x), (x, other)))
    assert twice != apart
    assert apart == key_of(call_of(module, (other, x), {}))


def test_a_custom_operator_with_a_backward_is_differentiated_as_in_eager():
    module, x = of(lambda m, x: doubled(m.linear(x))), rows()
    ours, eager = run(graph_of(module, x), module, x), module(x)
    assert torch.equal(ours, eager)
    assert torch.equal(*(torch.autograd.grad(y.sum(), module.linear.weight)[0] for y in (ours, eager)))


def test_nested_and_keyword_arguments_find_their_places():
    def forward(m: Of, x: Tensor, state: Any, *, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        y = m.linear(x) * state["factors"][1] + state["shift"]
        return y * scale if mask is None else y * mask * scale

    def arguments(count: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        state = {"factors": (rows(count), rows(count) + 1), "shift": rows(count) - 1}
        return (rows(count), state), {"mask": torch.ones(count, 1), "scale": 0.5}

    module = of(forward)
    args, kwargs = arguments(4)
    graph = graph_of(module, *args, **kwargs)
    args, kwargs = arguments(6)
    assert torch.equal(run(graph, module, *args, **kwargs), module(*args, **kwargs))


RESULTS: dict[str, Callable[[Of, Tensor], Any]] = {
    "a tensor": lambda m, x: m.linear(x),
    "a tuple": lambda m, x: (m.linear(x), x.sum()),
    "a list with None": lambda m, x: [m.linear(x), None],
    "a nested dict": lambda m, x: {"hidden": m.linear(x), "more": {"flag": True, "name": "y", "pair": (x * 2, 1.5)}},
    "the input itself": lambda m, x: (m.linear(x), x),
    "a size": lambda m, x: (m.linear(x), x.shape[0]),
    "a computed size": lambda m, x: (m.linear(x), 2 * x.shape[0] + 1),
    "one tensor twice": lambda m, x: (y := m.linear(x), y),
    "a parameter": lambda m, x: (m.linear(x), m.linear.weight),
    "a dtype": lambda m, x: (m.linear(x), x.dtype),
}


@pytest.mark.parametrize("name", RESULTS)
def test_the_result_has_the_structure_and_values_of_the_forward(name):
    module = of(RESULTS[name])
    ours, eager = run(graph_of(module, rows(4)), module, rows(6)), module(rows(6))
    (structure, leaves), (expected_structure, expected) = flatten(ours), flatten(eager)
    assert structure == expected_structure
    for one, other in zip(leaves, expected, strict=True):
        assert type(one) is type(other) or isinstance(one, Tensor)
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


def test_dropout_draws_what_eager_draws():
    module = of(simple)
    graph = graph_of(module, rows(4))
    torch.manual_seed(3)
    ours = run(graph, module, rows(6))
    torch.manual_seed(3)
    assert torch.equal(ours, module(rows(6)))


def test_a_module_on_the_meta_device_can_be_captured():
    module, real = nn.Linear(WIDTH, WIDTH, device="meta"), nn.Linear(WIDTH, WIDTH)
    graph = graph_of(module, torch.zeros(3, WIDTH, device="meta"))
    assert torch.equal(run(graph, real, rows(5)), real(rows(5)))


def test_a_forward_that_asks_for_its_own_class_sees_it():
    def forward(m: Of, x: Tensor) -> Tensor:
        return m.linear(x) if type(m) is Of and m.__class__ is Of and type(m.linear) is nn.Linear else x

    assert operations(capture(of(forward), (rows(),), {}).gm) == {"linear": 1}


# For which sizes it stands.


def half(m: Of, x: Tensor) -> Tensor:
    return m.linear(x.unflatten(0, (2, -1)).sum(0))


def short_or_long(m: Of, x: Tensor) -> Tensor:
    return m.linear(x) if x.shape[0] < 6 else m.linear(x) * 2


def even_or_odd(m: Of, x: Tensor) -> Tensor:
    return m.linear(x) if x.shape[0] % 2 else m.linear(x) * 2


def square(m: Of, x: Tensor) -> Tensor:
    return m.linear(x) @ x.transpose(0, 1)[: x.shape[0]] if x.dim() == 2 and x.shape[0] == WIDTH else m.linear(x)


def windows(m: Of, x: Tensor) -> Tensor:
    return m.linear(x).unfold(0, 2, 2).sum(-1)


def table(m: Of, x: Tensor) -> Tensor:
    return m.linear(x) + torch.arange(9.0)[: x.shape[0], None]


SIZED = (half, short_or_long, even_or_odd, square, windows, table)


@pytest.fixture(scope="module")
def sized() -> dict[tuple[str, int], tuple[Of, RegionGraph]]:
    """Captures of each function in SIZED at several sizes."""
    return {
        (function.__name__, size): (module := of(function), graph_of(module, rows(size)))
        for function in SIZED
        for size in (2, 4, 6, 8)
    }


@for_any(st.sampled_from(SIZED), st.sampled_from([2, 4, 6, 8]), st.integers(1, 12), examples=150)
def test_where_the_guards_hold_the_graph_is_the_forward(sized, function, captured_at, size):
    module, graph = sized[function.__name__, captured_at]
    x = rows(size)
    if not fits(graph, module, x):
        return
    assert torch.equal(run(graph, module, x), module(x))


@pytest.mark.parametrize("size", [2, 4, 6, 8])
@pytest.mark.parametrize("function", SIZED, ids=lambda function: function.__name__)
def test_the_guards_hold_for_the_sizes_that_were_captured(sized, function, size):
    module, graph = sized[function.__name__, size]
    assert fits(graph, module, rows(size))


def test_a_linear_stands_for_every_batch_and_length_but_one():
    module = of(simple)
    graph = graph_of(module, rows(3, 5))
    assert all(fits(graph, module, rows(*lead)) for lead in ((2, 2), (7, 3), (5, 1000)))
    assert not any(fits(graph, module, rows(*lead)) for lead in ((1, 5), (3, 1), (1, 1)))


def test_a_size_of_one_stands_for_one_alone():
    module = of(simple)
    graph = graph_of(module, rows(1, 5))
    assert fits(graph, module, rows(1, 9)) and not fits(graph, module, rows(2, 5))


def test_a_branch_on_a_size_is_a_guard():
    module = of(short_or_long)
    graph = graph_of(module, rows(4))
    assert fits(graph, module, rows(5)) and not fits(graph, module, rows(6))


SCALES: dict[str, Callable[[int], Any]] = {
    "int": lambda n: int(n * 0.4),
    "ceil": lambda n: math.ceil(n * 0.4),
    "floor": lambda n: math.floor(n * 0.4),
    "round": lambda n: round(n * 0.3),
    "sqrt": lambda n: int(math.sqrt(n)),
}


@pytest.mark.parametrize("name", SCALES)
def test_a_part_whose_length_is_computed_with_mathematical_functions_has_guards_that_hold(name):
    module = of(lambda m, x: m.linear(x)[:, : SCALES[name](x.shape[1])])
    graph = graph_of(module, rows(3, 8))
    assert fits(graph, module, rows(3, 8))
    for length in (5, 9, 10, 20, 31):
        x = rows(3, length)
        assert not fits(graph, module, x) or torch.equal(run(graph, module, x), module(x))


def test_a_mask_that_is_broadcast_stays_broadcast():
    module = of(lambda m, x, mask: m.linear(x) * mask)
    graph = graph_of(module, rows(3, 5), torch.ones(1, 5, 1))
    assert fits(graph, module, rows(2, 6), torch.ones(1, 6, 1))
    assert not fits(graph, module, rows(2, 6), torch.ones(2, 6, 1))
    assert not fits(graph, module, rows(2, 6), torch.ones(1, 5, 1))


# On which attributes it depends.


class Scaled(nn.Module):
    kind = "a class attribute"

    def __init__(self, inner: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.scale, self._shift, self.unused = 2.0, 1.0, 5
        self.inner = Scaled(False) if inner else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) * self.scale + self._shift
        return y if self.inner is None or not self.kind else self.inner(y)


def test_the_plain_attributes_that_the_forward_read_are_listed():
    """Private ones too: two layers that differ in one would share a graph otherwise."""
    reads = capture(Scaled(), (rows(),), {}).reads
    assert {("", "scale"), ("inner", "scale"), ("", "kind"), ("", "_shift"), ("inner", "_shift")} <= reads
    others = {"unused", "linear", "weight", "bias", "_parameters", "_modules", "_buffers", "_forward_hooks"}
    assert not others & {name for _, name in reads}


class Configured(nn.Module):
    """Reads numbers from its class, from a plain object and from a dict."""

    factor = 1.0
    limit: float | None = None

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.config = SimpleNamespace(factor=1.0, unused=1.0)
        self.options = {"factor": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) * self.factor * self.config.factor * self.options["factor"]
        return y if self.limit is None else y.clamp(max=self.limit)


CHANGES: dict[str, Callable[[Configured], None]] = {
    "the class": lambda m: setattr(Configured, "factor", 3.0),
    "the class, where it was None": lambda m: setattr(Configured, "limit", 3.0),
    "the instance": lambda m: setattr(m, "factor", 3.0),
    "an object": lambda m: setattr(m.config, "factor", 3.0),
    "another object": lambda m: setattr(m, "config", SimpleNamespace(factor=3.0)),
    "a dict": lambda m: m.options.update(factor=3.0),
    "another dict": lambda m: setattr(m, "options", {"factor": 3.0}),
}


@pytest.mark.parametrize("where", CHANGES)
def test_a_number_that_the_forward_read_and_that_is_changed_later_makes_the_graph_stale(where, monkeypatch):
    monkeypatch.setattr(Configured, "factor", 1.0)
    monkeypatch.setattr(Configured, "limit", None)
    module, x = Configured(), rows()
    graph, call = graph_of(module, x), call_of(module, (x,), {})
    assert find_graph([graph], call, key_of(call), exact=False) is graph
    CHANGES[where](module)
    call = call_of(module, (x,), {})
    assert find_graph([graph], call, key_of(call), exact=False) is None


# What cannot be captured.


class Reverse(torch.autograd.Function):
    """Reverses the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


def hooked(m: Of, x: Tensor) -> Tensor:
    y = m.linear(x)
    y.register_hook(lambda gradient: gradient * 2)
    return y


def retaining(m: Of, x: Tensor) -> Tensor:
    y = m.linear(x)
    y.retain_grad()
    return y


def packing(m: Of, x: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.half(), lambda t: t.float()):
        return m.linear(x).relu()


def appending(m: Of, x: Tensor, losses: list[Tensor]) -> Tensor:
    y = m.linear(x)
    losses.append(y.mean())
    return y


def setting(m: Of, x: Tensor, context: dict[str, Tensor]) -> Tensor:
    y = m.linear(x)
    context["loss"] = y.mean()
    return y


def drawing(m: Of, x: Tensor) -> Tensor:
    return m.linear(x) + torch.rand(WIDTH, generator=torch.Generator())


class Cache:
    """Something that is no tensor."""


REFUSED: dict[str, tuple[Callable[..., Any], tuple[Any, ...], str]] = {
    "an argument of another type": (lambda m, x, cache: m.linear(x), (Cache(),), "takes an argument of type Cache"),
    "one inside a list": (lambda m, x, caches: m.linear(x), ([Cache()],), "takes an argument of type Cache"),
    "a result of another type": (lambda m, x: Cache(), (), "returns a Cache"),
    "a branch on a value": (lambda m, x: m.linear(x) if x.sum() > 0 else x, (), "branches on the values"),
    "a loop over values": (lambda m, x: sum(m.linear(x[i]) for i in x[:, 0, 0].long().unique().tolist()), (), ""),
    "a tensor as a number": (lambda m, x: m.linear(x) * x.sum().item() if x.max().item() > 0 else x, (), ""),
    "an autograd function": (lambda m, x: m.linear(Reverse.apply(x)), (), "autograd.Function"),
    "a hook on a tensor": (hooked, (), "hook"),
    "a gradient kept": (retaining, (), "retain_grad"),
    "a checkpoint": (lambda m, x: checkpoint(m.linear, x, use_reentrant=False) + 1, (), "checkpoint"),
    "a reentrant checkpoint": (lambda m, x: checkpoint(m.linear, x, use_reentrant=True) + 1, (), "checkpoint"),
    "hooks on saved tensors": (packing, (), "saved_tensors_hooks"),
    "a list that it appends to": (appending, ([],), "list"),
    "a dict that it writes to": (setting, ({},), "dict"),
    "a generator": (drawing, (), "generator"),
    "an error of its own": (failing, (), "RuntimeError: a bug in the forward"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_captured_is_refused_with_the_reason_in_one_line(name):
    function, more, reason = REFUSED[name]
    with pytest.raises(CaptureError) as caught:
        capture(of(function), (rows(), *more), {})
    text = str(caught.value)
    assert reason.lower() in text.lower()
    assert text and "\n" not in text and len(text) <= 300


HELD: dict[str, tuple[Any, Callable[[Any], Tensor], str]] = {
    "a plain attribute": (torch.ones(WIDTH), lambda tables: tables, r"its forward reads tables.*register it"),
    "a list": ([torch.ones(WIDTH)], lambda tables: tables[0], ".*"),
    "a dict": ({"bias": torch.ones(WIDTH)}, lambda tables: tables["bias"], ".*"),
    "a list in a dict": ({"all": [torch.ones(WIDTH)]}, lambda tables: tables["all"][0], ".*"),
}


@pytest.mark.parametrize("name", HELD)
def test_a_tensor_that_is_neither_parameter_nor_buffer_is_refused(name):
    """A graph would hold it for good, whatever becomes of the attribute."""
    tables, read, reason = HELD[name]
    with pytest.raises(CaptureError, match=reason):
        capture(of(lambda m, x: m.linear(x) + read(m.tables), tables=tables), (rows(),), {})


def test_a_graph_can_be_copied():
    module, x = of(lambda m, x: F.gelu(m.linear(x))), rows()
    gm = capture(module, (x,), {}).gm
    assert type(gm).__mro__[1] is torch.fx.GraphModule
    copied = copy.deepcopy(gm)
    assert graph_text(copied) == graph_text(gm)
    assert torch.equal(copied(*state_of(module).values(), x)[0], module(x))


class Settings:
    """Like a model's configuration, of which one forward reads a part."""

    def __init__(self) -> None:
        self.factor, self.kind = 2.0, None


def test_a_field_that_the_forward_did_not_read_may_change():
    """Hugging Face heads write what kind of problem it is into the configuration in their first forward."""
    module, x = of(lambda m, x: m.linear(x) * m.settings.factor, settings=Settings()), rows()
    graph, call = graph_of(module, x), call_of(module, (x,), {})
    module.settings.kind = "classification"
    assert find_graph([graph], call, key_of(call), exact=False) is graph
    module.settings.factor = 3.0
    assert find_graph([graph], call, key_of(call), exact=False) is None
