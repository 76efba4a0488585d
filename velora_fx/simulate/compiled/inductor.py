"""Inductor as far as the code it writes, run on tensors without memory.

That code allocates and frees every buffer by name; with kernels that compute nothing it shows what a compiled graph
holds at any time, to the byte: fused intermediates never appear, and buffers are used again as in a real run.

Planned for CUDA without a GPU, the code is that for the CPU, with attention as the GPU's one operator. Triton's fuses
by the same scheduler: the forward of a Llama block of 7B size with embedding, head and loss allocates as many bytes in
either. In backward Triton may split large reductions, which takes small buffers more.
"""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, map_arg

from velora_fx.capture import isolated
from velora_fx.passes.kept_for_backward import Kept, kept_for_backward
from velora_fx.simulate import StepTimer, kernels_of

Observe = Callable[[Mapping[str, torch.Tensor], Mapping[str, Kept]], None]


@dataclass
class Inductor:
    """Compiles graphs for fake inputs, equal ones once, and runs them; `device` is the one that is planned for.

    `timer` is told of the kernels that run. What was compiled lately by others is taken from them: who plans for
    several budgets, or plans and then optimizes, compiles once.
    """

    device: torch.device
    timer: StepTimer
    compiled: dict[tuple[Any, ...], CompiledGraph] = field(default_factory=dict)

    def run(self, gm: GraphModule, inputs: Sequence[torch.Tensor], observe: Observe) -> tuple[Any, ...]:
        """The outputs of the graph, differentiable.

        After its forward `observe` gets the tensors kept for backward by name, and what each is kept for.
        """
        key = (structure(gm), *(describe(tensor) for tensor in inputs))
        if key not in self.compiled:
            self.compiled[key] = self._kept_or_compiled(key, gm, inputs)
        graph = self.compiled[key]
        graph.mode = next(tensor.fake_mode for tensor in inputs if isinstance(tensor, FakeTensor))
        graph.timer = self.timer
        graph.observe.append(observe)
        try:
            assert graph.call is not None
            outputs = graph.call(*inputs)
        finally:
            graph.observe.pop()
        return tuple(outputs)

    def _kept_or_compiled(self, key: tuple[Any, ...], gm: GraphModule, inputs: Sequence[torch.Tensor]) -> CompiledGraph:
        key = self.device, _settings(self.device), *key
        graph = KEPT.pop(key, None)
        if graph is None:
            with isolated(), without_function_modes(), without_collector(), kernels_of(self.device):
                likes = [_like(tensor) for tensor in inputs]  # what is compiled for stays with the compiled code
                graph = _compile(gm, likes)
        KEPT[key] = graph
        for oldest in list(KEPT)[:-MOST_KEPT]:
            KEPT.pop(oldest, None)
        return graph


def _settings(device: torch.device) -> tuple[Any, ...]:
    """What else compiled code depends on."""
    from torch._functorch import config as functorch_config
    from torch._inductor import config

    return (
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        config.get_hash(),
        functorch_config.get_hash(),
    )


@contextlib.contextmanager
def without_function_modes() -> Iterator[None]:
    """Keeps the compiler out of the sight of function modes: each of its many calls on tensors would pass them."""
    modes = [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())]
    try:
        yield
    finally:
        for mode in reversed(modes):
            torch._C._push_on_torch_function_stack(mode)


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Keeps Python's collector of cycles away, which would look at the many objects of a compiler all the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _like(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same kind, of which nothing else is made; a real one is there anyway."""
    if not isinstance(tensor, FakeTensor):
        return tensor
    with tensor.fake_mode:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return made.requires_grad_(tensor.requires_grad)


@dataclass
class CompiledGraph:
    """A compiled graph, what its backward needs each kept tensor for, and who watches the call in progress.

    `source` is the graph that it is of, whose constants it is known by. Its tensors are made in the fake mode, and its
    kernels told to the timer, of who runs it.
    """

    source: GraphModule
    call: Callable[..., Any] | None = None
    kept: dict[str, Kept] = field(default_factory=dict)
    observe: list[Observe] = field(default_factory=list)
    mode: FakeTensorMode | None = None
    timer: StepTimer | None = None

    def empty_strided(self, device: str, size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
        """A new tensor without memory."""
        assert self.mode is not None
        with self.mode:
            return torch.empty_strided(size, stride, dtype=dtype, device=device)

    def add_kernels(self, kernels: Sequence[int]) -> None:
        """Tells the timer of kernels by the bytes that they read and write."""
        assert self.timer is not None
        for num_bytes in kernels:
            self.timer.add_kernel(num_bytes)


KEPT: dict[tuple[Any, ...], CompiledGraph] = {}  # the latest last
MOST_KEPT = 64


def structure(gm: GraphModule) -> tuple[Any, ...]:
    """The graph as something to compare: nodes by number, since blocks differ in the names of their parameters."""
    numbers = {node: number for number, node in enumerate(gm.graph.nodes)}
    state = gm.meta.get("state", {})  # which the partitioner keeps for free
    described = []
    for node in gm.graph.nodes:
        target = node.target if node.op == "call_function" else node.name in state
        if node.op == "get_attr":
            constant = getattr(gm, str(node.target))
            target = structure(constant) if isinstance(constant, GraphModule) else id(constant)
        described.append((node.op, target, repr(map_arg((node.args, node.kwargs), lambda n: f"%{numbers[n]}"))))
    return tuple(described), gm.meta.get("_checkpoint_context_fn")


def describe(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What tensors have in common that a compiled graph treats alike."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _compile(gm: GraphModule, inputs: Sequence[torch.Tensor]) -> CompiledGraph:
    from torch._functorch import config as functorch_config
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    num_constants = len(list(gm.parameters())) + len(list(gm.buffers()))  # inputs of the compiled graph before `inputs`
    made = CompiledGraph(gm)

    def inner_compile(graph: GraphModule, example_inputs: Any, **options: Any) -> Any:
        returned: Any = graph.graph.output_node().args[0]
        names = [str(node) for node in returned]
        if options.get("is_backward"):
            made.kept.update(kept_for_backward(graph, num_constants))
        kernels: list[int] = []
        with without_kernels(), config.patch(_post_fusion_custom_pass=partial(_note_kernels, kernels)):
            code: Any = compile_fx_inner(graph, example_inputs, **options)
        has_code = hasattr(code, "current_callable")  # none is written for a graph that computes nothing
        generated = _generated(code.current_callable) if has_code else code
        if has_code:
            _allocate_fakes(generated, made)

        def run(arguments: list[Any]) -> Any:
            made.add_kernels(kernels)
            return generated(arguments)

        def observed(arguments: list[Any]) -> Any:
            outputs, kept = run(arguments), made.kept
            tensors = {n: t for n, t in zip(names, outputs, strict=True) if n in kept and isinstance(t, torch.Tensor)}
            made.observe[-1](tensors, kept)
            return outputs

        is_forward = not (options.get("is_backward") or options.get("is_inference"))
        way: Any = observed if is_forward else run
        if not has_code:
            way._boxed_call = True
            return way
        code.current_callable = way
        return code

    # Both graphs are compiled now: the backward's tells what is kept for which gradient.
    eager_backward = {"force_non_lazy_backward_lowering": True, "enable_autograd_cache": False}
    # Kernels are written but never run: plain ones are written soonest, and take the same buffers as vectorised ones.
    uncached = {"fx_graph_cache": False, "compile_threads": 1, "cpp.simdlen": 1, "graph_partition": False}
    with config.patch(uncached), functorch_config.patch(eager_backward):
        call: Any = compile_fx(_as_from_dynamo(gm), list(inputs), inner_compile=inner_compile)
    made.call = call
    return made


def _as_from_dynamo(gm: GraphModule) -> GraphModule:
    """A copy of the graph that tells, as one of Dynamo's does, which of its inputs are parameters and buffers.

    The partitioner keeps these for free; without a word it would rather keep their transposes, and Inductor would order
    the backward otherwise.
    """
    from torch._dynamo.source import LocalSource

    made = copy.deepcopy(gm)
    state = made.meta["state"]
    made.meta["dynamo_compile_id"] = None
    constants = (
        name
        for name, _ in (*made.named_parameters(remove_duplicate=False), *made.named_buffers(remove_duplicate=False))
    )
    made._param_name_to_source = {name: LocalSource(name) for name in constants}  # type: ignore[assignment]
    for node in made.graph.find_nodes(op="placeholder"):
        node._dynamo_source = LocalSource(node.name)
        if node.name in state:
            node.meta["tensor_dict"] = {"_dynamo_static_input_type": "guarded"}
    return made


def _note_kernels(kernels: list[int], nodes: list[Any]) -> list[Any]:
    """Adds the bytes that each kernel of Inductor's own reads and writes; other operators are timed as they run."""
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode

    others = (ExternKernelSchedulerNode, NopKernelSchedulerNode)
    kernels += [node.get_read_write_buffers_sizes() for node in nodes if not isinstance(node, others)]
    return nodes


class _NoKernel:
    def __call__(self, *args: Any, **kwargs: Any) -> None:
        pass

    run = __call__


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Has no kernel compiled: each becomes one that does nothing."""
    from torch._inductor.async_compile import AsyncCompile

    compilers = {name: vars(AsyncCompile)[name] for name in ("cpp", "cpp_pybinding", "triton")}
    try:
        for name in compilers:
            setattr(AsyncCompile, name, lambda self, *args, **kwargs: _NoKernel())
        yield
    finally:
        for name, compiler in compilers.items():
            setattr(AsyncCompile, name, compiler)


def _generated(call: Any) -> Any:
    """The generated code inside of what, on a GPU, first copies inputs that are not aligned."""
    while "empty_strided_cpu" not in getattr(call, "__func__", call).__globals__:
        call = next(cell.cell_contents for cell in call.__closure__ if callable(cell.cell_contents))
    return call


def _allocate_fakes(call: Any, graph: CompiledGraph) -> None:
    """Makes the functions by which the generated code gets its buffers and views give fake tensors."""

    def reinterpret(tensor: torch.Tensor, size: Any, stride: Any, offset: int = 0) -> torch.Tensor:
        return tensor.as_strided(size, stride, tensor.storage_offset() + offset)

    module = getattr(call, "__func__", call).__globals__
    module.update(
        empty_strided_cpu=partial(graph.empty_strided, "cpu"),
        empty_strided_cuda=partial(graph.empty_strided, "cuda"),
        reinterpret_tensor=reinterpret,
    )
