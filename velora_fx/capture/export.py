"""Captures the forward of one module as a plain FX graph with its parameters as inputs."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import _disable_current_modes

from velora_fx.capture.arguments import CONSTANTS, flatten, unflatten
from velora_fx.capture.attributes import changes_in, holds_tensor, own_forward, recorded_reads
from velora_fx.capture.checkpoints import Checkpoint, whole_checkpoint
from velora_fx.capture.refusals import CaptureError, refusals
from velora_fx.capture.state import attached_to, call_with, state_of

TRACED = (torch.Tensor, torch.SymInt)  # what a graph returns of a forward's results


@dataclass(frozen=True)
class Captured:
    """A forward as a graph: `gm(*state, *tensors)` returns the tensor leaves of the outputs.

    `gm.meta["state"]` maps the placeholder of each parameter and buffer to its dotted name, in order. `outputs` is
    the structure of the result, `constants` its leaves with None where a tensor belongs (at `slots`). `guards` are
    Python expressions over the list `ts` of all inputs; `reads` the attributes that the forward
    looked at, as `recorded_reads` lists them; `checkpoint` the one that all of the forward runs in, which the graph
    itself is without.
    """

    gm: GraphModule
    outputs: Any
    constants: tuple[Any, ...]
    slots: tuple[int, ...]
    guards: tuple[str, ...]
    reads: frozenset[tuple[str, ...]]
    checkpoint: Checkpoint | None = None


def capture(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    forward: Callable[..., Any] | None = None,
) -> Captured:
    """Captures `module(*args, **kwargs)` in training mode; nothing is executed and the module is left as it was.

    `forward` is the module's own forward where another one stands in for it (default: that of its class). Every
    dimension of the tensor arguments is free unless it is 1 or the forward fixes it. Grad mode, autocast and
    saved-tensor hooks of the caller stay out of the graph. Raises CaptureError, also for a forward that leaves
    something behind on the module, which a graph would not do at its next call.
    """
    state = state_of(module)
    structure, leaves = flatten((args, kwargs))
    _check_inputs(state, leaves)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    call = _FlatCall(module, state, structure, leaves)
    with isolated(), own_forward(module, forward) as changed, recorded_reads(module) as reads:
        program = _exported(call, list(state.values()), tensors)
    _check_attributes(module, reads, changed)
    for leaf in call.results:
        if not isinstance(leaf, (*TRACED, *CONSTANTS)):
            raise CaptureError(f"its forward returns a {type(leaf).__name__}")
    gm = plain_graph_module(program, list(state))
    if any(
        isinstance(held, (torch.nn.Parameter, FakeTensor)) for held in (*program.constants.values(), *gm.parameters())
    ):
        raise CaptureError(
            "its forward takes a parameter from elsewhere than its module, which a graph would not follow"
        )
    return Captured(
        gm,
        outputs=call.output_structure,
        constants=tuple(None if isinstance(leaf, TRACED) else leaf for leaf in call.results),
        slots=tuple(index for index, leaf in enumerate(call.results) if isinstance(leaf, TRACED)),
        guards=_guards(program, gm),
        reads=frozenset(reads),
        checkpoint=call.checkpoint,
    )


def _check_inputs(state: Mapping[str, torch.Tensor], leaves: Iterable[Any]) -> None:
    for leaf in leaves:
        if not isinstance(leaf, (torch.Tensor, *CONSTANTS)):
            raise CaptureError(f"its forward takes an argument of type {type(leaf).__name__}")
    for name, tensor in state.items():
        for attribute in attached_to(tensor):
            raise CaptureError(f"{name} has tensors in its {attribute} (is it quantised?), which no graph has")


def _exported(call: _FlatCall, state: list[torch.Tensor], tensors: list[torch.Tensor]) -> ExportedProgram:
    free = [{dim: Dim.AUTO for dim, size in enumerate(tensor.shape) if size != 1} for tensor in tensors]
    try:
        return export_function(call.of_tensors, [*state, *tensors], [*([None] * len(state)), *free])
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(_first_line(error)) from error
    finally:
        call.leaves.clear()  # else they live in the cycles that export leaves, until Python looks for those


def _check_attributes(module: torch.nn.Module, reads: Iterable[tuple[str, ...]], changed: Sequence[str]) -> None:
    for name, attribute in sorted(read for read in reads if len(read) == 2):
        if holds_tensor(getattr(module.get_submodule(name), attribute)):
            full = f"{name}.{attribute}".lstrip(".")
            raise CaptureError(f"its forward reads {full}, a tensor that is no parameter or buffer: register it as one")
    if changed:
        raise CaptureError(f"its forward sets the attribute {changed[0]}, which a graph would not do")


def export_function(
    function: Callable[[list[torch.Tensor]], list[Any]], like: list[torch.Tensor], shapes: list[Any] | None = None
) -> ExportedProgram:
    """The program of a function of a list of tensors, for fake ones like the given; `shapes` are their free dimensions,
    as `torch.export` takes them (default: none)."""
    dynamic_shapes = None if shapes is None else (shapes,)
    return torch.export.export(_Shim(function), (_fakes_of(like),), dynamic_shapes=dynamic_shapes, strict=False)


class _Shim(torch.nn.Module):
    """A function as the module that torch.export takes."""

    def __init__(self, function: Callable[[list[torch.Tensor]], list[Any]]) -> None:
        super().__init__()
        self.function = function

    def forward(self, ts: list[torch.Tensor]) -> list[Any]:
        return self.function(ts)


class _FlatCall(torch.nn.Module):
    """One call of a module as a function of its state and of the tensors among the arguments.

    It notes what the call returns and the checkpoint that all of it runs in. It calls the forward, without the hooks on
    the module: they stay outside of the graph (FSDP2's would reshard).
    """

    def __init__(self, inner: torch.nn.Module, names: Iterable[str], structure: Any, leaves: list[Any]) -> None:
        super().__init__()
        self.inner = inner
        self.names, self.structure, self.leaves = [f"inner.{name}" for name in names], structure, leaves
        self.caches_casts = torch.is_autocast_cache_enabled()
        self.output_structure: Any = None
        self.results: list[Any] = []
        self.checkpoint: Checkpoint | None = None

    def of_tensors(self, ts: list[torch.Tensor]) -> list[Any]:
        """The tensors and the sizes that the call returns for live state and arguments, one after the other."""
        given, first = iter(ts[len(self.names) :]), dict[int, torch.Tensor]()  # a tensor that is given twice is one
        filled = [
            first.setdefault(id(leaf), next(given)) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves
        ]
        args, kwargs = unflatten(self.structure, filled)
        torch.set_autocast_cache_enabled(self.caches_casts)  # what the forward's autocast takes; tracing had set it off
        with changes_in((args, kwargs)) as changed_arguments:
            output = call_with(self, dict(zip(self.names, ts, strict=False)), args, kwargs)
        if changed_arguments:
            raise CaptureError("its forward changes a list or dict that it is given, which a graph would not do")
        self.output_structure, self.results = flatten(output)
        return [leaf for leaf in self.results if isinstance(leaf, TRACED)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        before = state_of(self.inner)
        with refusals(), whole_checkpoint() as checkpoints:
            output = self.inner.forward(*args, **kwargs)
        self.checkpoint = checkpoints[0] if checkpoints else None
        for name, tensor in state_of(self.inner).items():
            if before.get(name) is not tensor:
                raise CaptureError(f"its forward replaces {name} by another tensor, which a graph would not do")
        return output


def _fakes_of(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Fake tensors like the given ones, with sizes of their own that export may make symbols of."""
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        return [
            torch.empty_strided(
                t.shape, t.stride(), dtype=t.dtype, device="cpu" if t.device.type == "meta" else t.device
            ).requires_grad_(t.requires_grad)
            for t in tensors
        ]


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Keeps the tracing out of the sight of dispatch modes and saved-tensor hooks (checkpointing) of the caller."""
    identity = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with (
        without_torch_logs(),
        _disable_current_modes(),
        identity,
        torch.enable_grad(),
        torch.random.fork_rng(devices=[]),
    ):
        yield


@contextlib.contextmanager
def without_torch_logs() -> Iterator[None]:
    """Has PyTorch log nothing meanwhile: what fails raises too, and is told of once."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Has what the caller has switched on leave planning alone: PyTorch's logs, the search for anomalies, which asks
    for values, and inference mode, in which nothing can be trained."""
    with without_torch_logs(), torch.autograd.set_detect_anomaly(False), torch.inference_mode(False):
        yield


def plain_graph_module(program: ExportedProgram, names: list[str]) -> GraphModule:
    """The exported graph in a GraphModule that pickles, flat inputs first to last, outputs as one tuple."""
    exported = program.module(check_guards=False)
    assert isinstance(exported, GraphModule)
    graph = Graph()
    values: dict[torch.fx.Node, torch.fx.Node] = {}
    output = graph.graph_copy(exported.graph, values)
    graph.output(tuple(output) if isinstance(output, (list, tuple)) else (output,))
    gm = GraphModule(exported, graph)
    gm.meta["state"] = dict(zip((node.name for node in graph.find_nodes(op="placeholder")), names, strict=False))
    return gm


def _guards(program: ExportedProgram, gm: GraphModule) -> tuple[str, ...]:
    """The conditions on input sizes under which the graph is the forward, over a list `ts` of all inputs."""
    guards = [re.sub(r"L\['ts'\]", "ts", guard) for guard in program._guards_code]
    for index, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        for dim, size in enumerate(node.meta["val"].shape):
            guards += _size_guards(f"ts[{index}].size()[{dim}]", size, program.range_constraints)
    return tuple(dict.fromkeys(guards))


def _size_guards(where: str, size: int | torch.SymInt, constraints: Mapping[Any, Any]) -> list[str]:
    if not isinstance(size, torch.SymInt):
        return [f"{where} == {size}"]
    bounds = constraints.get(size.node.expr)
    if bounds is None:
        return []
    least = [f"{where} >= {int(bounds.lower)}"] if bounds.lower > 0 else []
    most = [f"{where} <= {int(bounds.upper)}"] if bounds.upper.is_finite and bounds.upper < 2**31 else []
    return least + most


def _first_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300]
