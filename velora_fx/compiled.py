"""A model's forward as torch.compile runs it: compiled graphs one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree

from velora_fx.arguments import CONSTANTS
from velora_fx.capture import fakes_of, isolated, plain_graph_module, state_of
from velora_fx.fake import as_compiled, kernels_of
from velora_fx.inductor import Inductor, Observe
from velora_fx.limits import CaptureError, refusals
from velora_fx.opaque import BlockCall, record, replay
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
        program = self.program
        values = dict(zip(program.names, [*state_of(self.model).values(), *_tensors((args, kwargs))], strict=True))
        values.update(program.constants)
        last = {name: number for number, step in enumerate(program.steps) for name in step.inputs}
        for number, step in enumerate(program.steps):
            with self.inside(step.name):
                outputs = self.inductor.run(step.gm, [values[n] for n in step.inputs], self.observer_of(step.state))
            values.update(zip(step.outputs, outputs, strict=True))
            del outputs
            for name in {*step.inputs, *step.outputs}:
                if last.get(name, number) <= number and name not in program.results:
                    del values[name]
        outputs = _Together.apply(*(values[name] for name in program.results))  # type: ignore[no-untyped-call]
        return program.rebuild(list(outputs))


class _Together(torch.autograd.Function):
    """The outputs of a compiled model: those that no loss uses get a gradient of zeros, all when backward begins."""

    @staticmethod
    def forward(ctx: Any, *outputs: Any) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.outputs = [(output.shape, output.dtype, output.device, output.fake_mode) for output in outputs]
        ctx.mark_non_differentiable(*(output for output in outputs if not output.is_floating_point()))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        filled: list[torch.Tensor | None] = list(gradients)
        for number, (shape, dtype, device, mode) in enumerate(ctx.outputs):
            if gradients[number] is None and ctx.needs_input_grad[number]:
                with mode:
                    filled[number] = torch.zeros(shape, dtype=dtype, device=device)
        return tuple(filled)


def compiled_forward(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    graphs: Mapping[str, Sequence[Any]],
    inductor: Inductor,
    observer_of: ObserverOf,
    inside: Inside,
) -> CompiledForward:
    """The forward of a fake model for fake inputs as `torch.compile(model)` runs it.

    Repeated blocks, with the graphs in `graphs` or those of the regions installed on them, and the code between them
    are compiled one by one, so that equal blocks are compiled once. Raises ValueError for a model that cannot be traced
    as a whole.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), kernels_of(inductor.device):
        calls = record(model, args, kwargs, graphs)
        program = _program(model, args, kwargs, calls)
    return CompiledForward(model, program, inductor, observer_of, inside)


def _program(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], calls: Sequence[BlockCall]
) -> Program:
    gm, leaves, spec, num_results = _traced(model, args, kwargs, calls)
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    outputs = list(gm.graph.output_node().args[0])  # type: ignore[arg-type]
    state = {full: name for name, full in gm.meta["state"].items()}
    returned = iter(names[len(names) - sum(len(call.outputs) for call in calls) :])
    marked = iter(outputs[num_results:])
    markers = [list(islice(marked, call.num_tensors)) for call in calls]
    constants: dict[str, torch.Tensor] = {}
    steps: list[Step] = []
    cached: list[str] = []
    segments = cut_at_calls(gm, markers, outputs[:num_results])
    for number, segment in enumerate(segments):
        if segment.outputs:
            own = segment.gm.meta["state"]
            numbers = {k: own[name] for k, name in enumerate(segment.inputs) if name in own}
            steps.append(Step("", segment.gm, segment.inputs, segment.outputs, numbers))
        if number < len(calls):
            call = calls[number]
            projections = {f"projection_{number}_{k}": v for k, v in enumerate(call.projections)}
            constants.update(projections)
            inputs = (
                *(state[full] for full in call.state),
                *(_name(marker) for marker in markers[number]),
                *projections,
            )
            names_returned = tuple(islice(returned, len(call.outputs)))
            steps.append(Step(call.name, call.gm, inputs, names_returned, dict(enumerate(call.state))))
            cached += names_returned[len(names_returned) - call.num_cached :]

    def rebuild(tensors: list[Any]) -> Any:
        filled = iter(tensors)
        return _pytree.tree_unflatten([next(filled) if leaf is _TENSOR else leaf for leaf in leaves], spec)

    num_names = len(names) - sum(len(call.outputs) for call in calls)
    results = (*(node.name for node in outputs[:num_results]), *(cached if None in leaves else ()))
    return Program(tuple(steps), tuple(names[:num_names]), constants, results, rebuild)


_TENSOR = object()


def _name(marker: Node) -> str:
    source = marker.args[0]
    assert isinstance(source, Node)
    return source.name


def _traced(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], calls: Sequence[BlockCall]
) -> tuple[GraphModule, list[Any], Any, int]:
    """The graph of the forward around its blocks, the leaves of its result, their structure and the tensors' number."""
    leaves, spec = _pytree.tree_flatten((args, kwargs))
    state = state_of(model)
    tensors = _tensors((args, kwargs))
    result: dict[str, Any] = {}

    class Shim(torch.nn.Module):
        def forward(self, ts: list[torch.Tensor]) -> list[Any]:
            given = iter(ts[len(state) :])
            filled = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            call_args, call_kwargs = _pytree.tree_unflatten(filled, spec)
            named = dict(zip(state, ts, strict=False))
            with replay(model, calls, list(given)) as marked, refusals(), as_compiled():
                output = torch.func.functional_call(model, named, call_args, call_kwargs)
            result["leaves"], result["spec"] = _pytree.tree_flatten(output)
            return [*_tensors(result["leaves"]), *marked]

    inputs = [*state.values(), *tensors, *(tensor for call in calls for tensor in call.outputs)]
    try:
        with isolated():
            program = torch.export.export(Shim(), (fakes_of(inputs),), strict=False)
    except Exception as error:
        reason = error if isinstance(error, CaptureError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"target='inductor' plans for torch.compile(model), and this model cannot be traced as a whole ({reason}): "
            "use target='eager'"
        ) from error
    constants = [_constant(leaf) for leaf in result["leaves"]]
    gm = run(plain_graph_module(program, list(state)), PREPARE)
    return gm, constants, result["spec"], len(_tensors(result["leaves"]))


def _constant(leaf: Any) -> Any:
    """A leaf of the output that is the same in each call; caches, which are empty in training, are left out."""
    if isinstance(leaf, torch.Tensor):
        return _TENSOR
    if isinstance(leaf, CONSTANTS) or hasattr(leaf, "get_seq_length"):
        return leaf if isinstance(leaf, CONSTANTS) else None
    raise ValueError(
        f"target='inductor' cannot plan for a model that returns a {type(leaf).__name__}: use target='eager'"
    )


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
