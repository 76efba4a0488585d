"""Inductor's code on tensors without memory, against the same code on real ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._inductor import config

from tests.helpers.allocator import peak_of
from tests.helpers.graph_text import prepared
from tests.helpers.toys import Block
from velora_fx.capture import state_of
from velora_fx.devices import device_rates
from velora_fx.passes.kept_for_backward import Kept
from velora_fx.simulate import StepTimer, Tracker, fake_copy, fake_mode
from velora_fx.simulate.compiled import Inductor
from velora_fx.simulate.compiled.inductor import KEPT, CompiledGraph, _generated, without_kernels

CPU = torch.device("cpu")


def compiler() -> Inductor:
    return Inductor(CPU, StepTimer(device_rates(CPU)))


def block(width: int = 32) -> nn.Module:
    torch.manual_seed(0)
    made = Block(width)
    made.dropout.p = 0.0
    return made.train()


def inputs(module: nn.Module, rows: int = 64) -> list[Tensor]:
    """Fake state and one fake activation that wants a gradient."""
    fake = fake_copy(module, fake_mode(), CPU, "none")
    mode = next(fake.parameters()).fake_mode  # type: ignore[attr-defined]
    with mode:
        x = torch.empty(rows, 16, 32)
    return [*state_of(fake).values(), x.requires_grad_()]


def unobserved(tensors: Mapping[str, Tensor], kept: Mapping[str, Kept]) -> None:
    pass


def measured_peak(module: nn.Module, x: Tensor) -> int:
    """What a compiled forward and backward allocate besides state and input, on the real allocator."""
    torch._dynamo.reset()
    run = torch.compile(module, fullgraph=True)

    def step() -> None:
        run(x).sum().backward()
        x.grad = None
        module.zero_grad()

    step()
    return peak_of(step)


def test_the_peak_is_the_real_allocators_and_kernels_allocate_nothing() -> None:
    module = block()
    gm = prepared(module, torch.randn(64, 16, 32))
    tracker, given = Tracker(), inputs(module)
    for tensor in given:
        tracker.watch(tensor)
    with tracker:
        before = int(tracker.timeline().deltas.sum())
        compiler().run(gm, given, unobserved)[0].sum().backward()
        predicted = int(tracker.timeline().live_bytes.max())
    x = torch.randn(64, 16, 32, requires_grad=True)
    uncached = {"fx_graph_cache": False, "compile_threads": 1}
    with config.patch(uncached), functorch_config.patch(enable_autograd_cache=False):
        with without_kernels():
            empty = measured_peak(module, x)
        real = measured_peak(module, x)
    assert empty == real
    assert abs(predicted - before - real) <= 0.01 * real


def test_equal_graphs_are_compiled_once_and_other_shapes_again() -> None:
    module = block()
    inductor = compiler()
    for rows in (64, 64, 32):
        gm = prepared(module, torch.randn(64, 16, 32))
        inductor.run(gm, inputs(module, rows), unobserved)
    assert len(inductor.compiled) == 2


def test_what_was_compiled_for_one_step_is_run_for_another_with_its_own_tensors_and_times() -> None:
    module = block()
    gm, others = prepared(module, torch.randn(64, 16, 32)), []
    for _ in range(2):
        other, given = compiler(), inputs(module)
        (output,) = other.run(gm, given, unobserved)
        output.sum().backward()
        assert output.fake_mode is given[0].fake_mode  # type: ignore[attr-defined]
        assert given[-1].grad.fake_mode is given[0].fake_mode  # type: ignore[union-attr]
        others.append(other)
    assert [*others[0].compiled.values()] == [*others[1].compiled.values()]
    assert others[0].timer.seconds == others[1].timer.seconds > 0


def test_where_the_compiler_is_told_otherwise_it_compiles_again() -> None:
    module = block()
    gm, compiled = prepared(module, torch.randn(64, 16, 32)), list[CompiledGraph]()
    for level in (True, False):
        with config.patch(pattern_matcher=level):
            other = compiler()
            other.run(gm, inputs(module), unobserved)
            compiled += other.compiled.values()
    assert compiled[0] is not compiled[1]


def test_only_the_latest_graphs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("velora_fx.simulate.compiled.inductor.MOST_KEPT", 1)
    module, used = block(), list[CompiledGraph]()
    for rows in (64, 32, 64):
        other = compiler()
        other.run(prepared(module, torch.randn(64, 16, 32)), inputs(module, rows), unobserved)
        used += other.compiled.values()
    assert len(KEPT) == 1 and used[0] is not used[2]


def test_what_the_forward_keeps_is_shown_with_what_it_is_kept_for() -> None:
    module = block()
    gm = prepared(module, torch.randn(64, 16, 32))
    seen: dict[tuple[int, ...], Kept] = {}

    def observe(tensors: Mapping[str, Tensor], kept: Mapping[str, Kept]) -> None:
        seen.update({tuple(tensor.shape): kept[name] for name, tensor in tensors.items() if kept[name].gradients_of})

    compiler().run(gm, inputs(module), observe)
    names = list(state_of(module))
    found = {names[number]: width for use in seen.values() for number, _, width in use.gradients_of}
    assert found == {"up.weight": 32, "down.weight": 64}


class WithConstant(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        return super().forward(x * torch.tensor([1.0, 2.0]).repeat(16))


def test_constants_of_a_graph_shift_no_weights_number() -> None:
    module = WithConstant(32).train()
    gm = prepared(module, torch.randn(64, 16, 32))
    assert any(node.op == "get_attr" for node in gm.graph.nodes)
    found: dict[str, int] = {}

    def observe(tensors: Mapping[str, Tensor], kept: Mapping[str, Kept]) -> None:
        names = list(state_of(module))
        found.update({names[number]: width for name in tensors for number, _, width in kept[name].gradients_of})

    compiler().run(gm, inputs(module), observe)
    assert found == {"up.weight": 32, "down.weight": 64}


def test_compilers_are_what_they_were_afterwards() -> None:
    from torch._inductor.async_compile import AsyncCompile

    before = {name: vars(AsyncCompile)[name] for name in ("cpp", "cpp_pybinding", "triton")}
    with pytest.raises(KeyError), without_kernels():
        raise KeyError
    assert {name: vars(AsyncCompile)[name] for name in before} == before


def test_generated_code_is_found_inside_of_what_aligns_its_inputs_on_a_gpu():
    from torch._inductor.utils import align_inputs_from_check_idxs
    from torch.utils._ordered_set import OrderedSet

    generated: dict[str, Any] = {"empty_strided_cpu": None}
    exec("def call(args): return args", generated)
    wrapped = align_inputs_from_check_idxs(generated["call"], [0], OrderedSet())
    assert wrapped is not generated["call"] and _generated(wrapped) is generated["call"]
