"""A model's forward as torch.compile runs it: compiled graphs one after the other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.fx import GraphModule, Node
from torch.utils import _pytree

from velora_fx.arguments import CONSTANTS
from velora_fx.cache_filling import tensors_inside
from velora_fx.capture import fakes_of, isolated, plain_graph_module, state_of
from velora_fx.fake import as_compiled, kernels_of
from velora_fx.inductor import Inductor, Observe
from velora_fx.limits import CaptureError, refusals
from velora_fx.opaque import BlockCall, inner_calls, record, replay
from velora_fx.passes import PREPARE, run
from velora_fx.passes.cut_at_calls import cut_at_calls

ObserverOf = Callable[[Mapping[int, str]], Observe]
Inside = Callable[[str], AbstractContextManager[None]]


def unobserved(state: Mapping[int, str]) -> Observe:
    """An observer that looks away."""
    return lambda tensors, kept: None


@dataclass(frozen=True)
class Step:
    """A graph to run, with the names of its inputs (those of its state first) and outputs among all values.

    `name` is that of the block it stands for, "" for what the model does between blocks.
    """

    name: str
    gm: GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    state: Mapping[int, str]


@dataclass(frozen=True)
class Program:
    """Steps in order over named values: the state of the model and the tensors it is called with (`names`), constants
    and the steps' outputs. `rebuild` makes the model's output from the values named `results`."""

    steps: tuple[Step, ...]
    names: tuple[str, ...]
    constants: Mapping[str, torch.Tensor]
    results: tuple[str, ...]
    rebuild: Callable[[list[Any]], Any]


class CompiledForward:
    """Takes the place of a model's forward and runs its compiled graphs.

    `observer_of` makes the observer of one graph, given the parameter behind each of its inputs; `inside` the context
    for one, given the name of its block.
    """

    def __init__(
        self, model: torch.nn.Module, program: Program, inductor: Inductor, observer_of: ObserverOf, inside: Inside
    ) -> None:
        self.model = model
        self.program = program
        self.inductor = inductor
        self.observer_of = observer_of
        self.inside = inside

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outputs = _OneGraph.apply(self.run, *state_of(self.model).values(), *tensors_of((args, kwargs)))  # type: ignore[no-untyped-call]
        return self.program.rebuild(list(outputs))

    def run(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The results of the program for the model's state and the tensors that it is called with."""
        program = self.program
        values = {**dict(zip(program.names, tensors, strict=True)), **program.constants}
        last = {name: number for number, step in enumerate(program.steps) for name in step.inputs}
        for number, step in enumerate(program.steps):
            with self.inside(step.name):
                outputs = self.inductor.run(step.gm, [values[n] for n in step.inputs], self.observer_of(step.state))
            values.update(zip(step.outputs, outputs, strict=True))
            del outputs
            for name in {*step.inputs, *step.outputs}:
                if last.get(name, number) <= number and name not in program.results:
                    del values[name]
        return [values[name] for name in program.results]


class _OneGraph(torch.autograd.Function):
    """A compiled model as autograd sees it: one node.

    The gradients of all parameters are there when its backward ends. An output that no loss uses gets a gradient of
    zeros when it begins.
    """

    @staticmethod
    def forward(ctx: Any, run: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]], *tensors: Any) -> Any:
        ctx.set_materialize_grads(False)
        leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
        with torch.enable_grad():
            outputs = run(leaves)
        ctx.leaves = [get_gradient_edge(leaf) if leaf.requires_grad else None for leaf in leaves]
        ctx.outputs = [_Output.of(output) if output.requires_grad else None for output in outputs]
        results = tuple(output.detach() for output in outputs)
        ctx.mark_non_differentiable(*(r for r, output in zip(results, ctx.outputs, strict=True) if output is None))
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        edges, given = [], []
        for output, gradient in zip(ctx.outputs, gradients, strict=True):
            if gradient is not None:
                edges.append(output.edge)
                given.append(gradient)
            elif output is not None:
                output.hold_zeros()
        del gradients
        wanted = [leaf for leaf in ctx.leaves if leaf is not None]
        found = iter(torch.autograd.grad(edges, wanted, given, allow_unused=True))
        return None, *(None if leaf is None else next(found) for leaf in ctx.leaves)


@dataclass(frozen=True)
class _Output:
    """What is needed of an output in backward, without holding it."""

    edge: GradientEdge
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    mode: FakeTensorMode

    @classmethod
    def of(cls, tensor: Any) -> _Output:
        return cls(get_gradient_edge(tensor), tensor.shape, tensor.dtype, tensor.device, tensor.fake_mode)

    def hold_zeros(self) -> None:
        """Holds a gradient of zeros until the backward of the output's own graph, which makes one itself."""
        with self.mode:
            held = [torch.zeros(self.shape, dtype=self.dtype, device=self.device)]
        self.edge.node.register_prehook(lambda gradients: held.clear())


def compiled_forward(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    graphs: Mapping[str, Sequence[Any]],
    inductor: Inductor,
    observer_of: ObserverOf,
    inside: Inside,
    by_blocks: bool = False,
) -> CompiledForward:
    """The forward of a fake model for fake inputs as `torch.compile(model)` runs it.

    Where equal blocks follow each other, with the graphs in `graphs` or those of the regions installed on them, one is
    compiled for all but the first and the last of these; with `by_blocks` each block is compiled apart, so that what a
    graph keeps belongs to one block. Raises ValueError for a model that cannot be traced as a whole.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), kernels_of(inductor.device):
        calls = record(model, args, kwargs, graphs)
        known = frozenset(number for number, call in enumerate(calls) if call.gm is not None)
        program = _program(model, args, kwargs, calls, known if by_blocks else inner_calls(calls))
    return CompiledForward(model, program, inductor, observer_of, inside)


def _program(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    calls: Sequence[BlockCall],
    left_out: Collection[int],
) -> Program:
    trace = _trace(model, args, kwargs, calls, left_out)
    gm, apart = trace.gm, [call for number, call in enumerate(calls) if number in left_out]
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    outputs = list(gm.graph.output_node().args[0])  # type: ignore[arg-type]
    num_names = len(names) - sum(len(call.outputs) for call in apart)
    state = {full: name for name, full in gm.meta["state"].items()}
    returned, marked = iter(names[num_names:]), iter(outputs[trace.num_results :])
    markers = [list(islice(marked, call.num_tensors)) for call in apart]
    constants: dict[str, torch.Tensor] = {}
    steps: list[Step] = []
    results = [node.name for node in outputs[: trace.num_results]]
    for number, segment in enumerate(cut_at_calls(gm, markers, outputs[: trace.num_results])):
        if segment.outputs:
            own = segment.gm.meta["state"]
            numbers = {k: own[name] for k, name in enumerate(segment.inputs) if name in own}
            steps.append(Step("", segment.gm, segment.inputs, segment.outputs, numbers))
        if number < len(apart):
            call = apart[number]
            assert call.gm is not None
            projections = {f"projection_{number}_{k}": v for k, v in enumerate(call.projections)}
            constants.update(projections)
            inputs = (*(state[full] for full in call.state), *map(_name, markers[number]), *projections)
            names_returned = tuple(islice(returned, len(call.outputs)))
            steps.append(Step(call.name, call.gm, inputs, names_returned, dict(enumerate(call.state))))
            results += names_returned[len(names_returned) - call.num_cached :] if trace.returns_caches else ()
    return Program(tuple(steps), tuple(names[:num_names]), constants, tuple(results), trace.rebuild)


_TENSOR = object()


def _name(marker: Node) -> str:
    source = marker.args[0]
    assert isinstance(source, Node)
    return source.name


@dataclass(frozen=True)
class Trace:
    """The graph of a model's forward but for the blocks left out, and its result: the leaves, with _TENSOR where a
    tensor belongs, and their structure.

    The first `num_results` outputs are the tensors of the result, and those in the caches that it holds.
    """

    gm: GraphModule
    leaves: Sequence[Any]
    structure: Any
    num_results: int

    @property
    def returns_caches(self) -> bool:
        """True if the result holds the key-value caches that the blocks filled."""
        return _CACHE in self.leaves

    def rebuild(self, tensors: list[Any]) -> Any:
        """The model's result from its tensors; caches are None."""
        filled = iter(tensors)
        leaves = [next(filled) if leaf is _TENSOR else None if leaf is _CACHE else leaf for leaf in self.leaves]
        return _pytree.tree_unflatten(leaves, self.structure)


def _trace(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    calls: Sequence[BlockCall],
    left_out: Collection[int],
) -> Trace:
    leaves, spec = _pytree.tree_flatten((args, kwargs))
    state = state_of(model)
    tensors = tensors_of((args, kwargs))
    result: dict[str, Any] = {}

    class Shim(torch.nn.Module):
        def forward(self, ts: list[torch.Tensor]) -> list[Any]:
            given = iter(ts[len(state) :])
            filled = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            call_args, call_kwargs = _pytree.tree_unflatten(filled, spec)
            named = dict(zip(state, ts, strict=False))
            with replay(model, calls, left_out, list(given)) as marked, refusals(), as_compiled():
                output = torch.func.functional_call(model, named, call_args, call_kwargs)
            result["leaves"], result["structure"] = _pytree.tree_flatten(output)
            held = [tensor for leaf in result["leaves"] if _is_cache(leaf) for tensor in tensors_inside(leaf)]
            results = [*tensors_of(result["leaves"]), *held]
            result["num_results"] = len(results)
            return [*results, *marked]

    apart = [call for number, call in enumerate(calls) if number in left_out]
    inputs = [*state.values(), *tensors, *(tensor for call in apart for tensor in call.outputs)]
    try:
        with isolated():
            program = torch.export.export(Shim(), (fakes_of(inputs),), strict=False)
    except Exception as error:
        reason = error if isinstance(error, CaptureError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"target='inductor' plans for torch.compile(model), and this model cannot be traced as a whole ({reason}): "
            "use target='eager'"
        ) from error
    kinds = [_kind_of(leaf) for leaf in result["leaves"]]
    gm = run(plain_graph_module(program, list(state)), PREPARE)
    return Trace(gm, kinds, result["structure"], result["num_results"])


_CACHE = object()


def _is_cache(leaf: Any) -> bool:
    return hasattr(leaf, "get_seq_length")


def _kind_of(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return _TENSOR
    if _is_cache(leaf):
        return _CACHE
    if isinstance(leaf, CONSTANTS):
        return leaf
    raise ValueError(
        f"target='inductor' cannot plan for a model that returns a {type(leaf).__name__}: use target='eager'"
    )


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors among the leaves of nested containers."""
    return [leaf for leaf in _pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
