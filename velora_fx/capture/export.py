"""Captures the forward of one module as a plain FX graph with its parameters as inputs."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from velora_fx.capture.state import attached_to, state_of


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
    structure, leaves = flatten((args, kwargs))
    for leaf in leaves:
        if not isinstance(leaf, (torch.Tensor, *CONSTANTS)):
            raise CaptureError(f"its forward takes an argument of type {type(leaf).__name__}")
    slots = [index for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    state = state_of(module)
    for name, tensor in state.items():
        for attribute in attached_to(tensor):
            raise CaptureError(f"{name} has tensors in its {attribute} (is it quantised?), which no graph has")
    names = list(state)
    caches_casts = torch.is_autocast_cache_enabled()
    forward_only, result = _ForwardOnly(module), dict[str, Any]()

    class Shim(torch.nn.Module):
        def forward(self, ts: list[torch.Tensor]) -> list[Any]:
            filled = list(leaves)
            traced = dict(zip(slots, ts[len(names) :], strict=True))
            for slot in slots:
                filled[slot] = traced[next(other for other in slots if leaves[other] is leaves[slot])]
            call_args, call_kwargs = unflatten(structure, filled)
            named = {f"inner.{name}": tensor for name, tensor in zip(names, ts, strict=False)}
            torch.set_autocast_cache_enabled(caches_casts)  # what the forward's autocast takes; tracing had set it off
            with changes_in((call_args, call_kwargs)) as changed_arguments:
                output = torch.func.functional_call(forward_only, named, call_args, call_kwargs)
            if changed_arguments:
                raise CaptureError("its forward changes a list or dict that it is given, which a graph would not do")
            result["outputs"], result["leaves"] = flatten(output)
            return [leaf for leaf in result["leaves"] if isinstance(leaf, (torch.Tensor, torch.SymInt))]

    tensors = [leaves[slot] for slot in slots]
    free = [{dim: Dim.AUTO for dim, size in enumerate(tensor.shape) if size != 1} for tensor in tensors]
    with isolated(), own_forward(module, forward) as changed, recorded_reads(module) as reads:
        inputs = fakes_of([*state.values(), *tensors])
        try:
            program = torch.export.export(Shim(), (inputs,), dynamic_shapes=([None] * len(state) + free,), strict=False)
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(_first_line(error)) from error
        finally:
            leaves.clear()  # else they live in the cycle that a local class is, until Python looks for those
    _check_attributes(module, reads, changed)
    constants = []
    for leaf in result["leaves"]:
        if not isinstance(leaf, (torch.Tensor, torch.SymInt, *CONSTANTS)):
            raise CaptureError(f"its forward returns a {type(leaf).__name__}")
        constants.append(None if isinstance(leaf, (torch.Tensor, torch.SymInt)) else leaf)
    output_slots = [i for i, leaf in enumerate(result["leaves"]) if isinstance(leaf, (torch.Tensor, torch.SymInt))]
    gm = plain_graph_module(program, names)
    if any(
        isinstance(held, (torch.nn.Parameter, FakeTensor)) for held in [*program.constants.values(), *gm.parameters()]
    ):
        raise CaptureError(
            "its forward takes a parameter from elsewhere than its module, which a graph would not follow"
        )
    guards = _guards(program, gm, len(state))
    return Captured(
        gm, result["outputs"], tuple(constants), tuple(output_slots), guards, frozenset(reads), forward_only.checkpoint
    )


def _check_attributes(module: torch.nn.Module, reads: Iterable[tuple[str, ...]], changed: Sequence[str]) -> None:
    for name, attribute in sorted(read for read in reads if len(read) == 2):
        if holds_tensor(getattr(module.get_submodule(name), attribute)):
            full = f"{name}.{attribute}".lstrip(".")
            raise CaptureError(f"its forward reads {full}, a tensor that is no parameter or buffer: register it as one")
    if changed:
        raise CaptureError(f"its forward sets the attribute {changed[0]}, which a graph would not do")


class _ForwardOnly(torch.nn.Module):
    """Calls the forward of a module without the hooks on it: they stay outside of the graph (FSDP2's would reshard)."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.checkpoint: Checkpoint | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        before = state_of(self.inner)
        with refusals(), whole_checkpoint() as checkpoints:
            output = self.inner.forward(*args, **kwargs)
        self.checkpoint = checkpoints[0] if checkpoints else None
        for name, tensor in state_of(self.inner).items():
            if before.get(name) is not tensor:
                raise CaptureError(f"its forward replaces {name} by another tensor, which a graph would not do")
        return output


def fakes_of(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
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
    logger = logging.getLogger("torch")
    level = logger.level
    identity = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    logger.setLevel(logging.ERROR)
    try:
        with _disable_current_modes(), identity, torch.enable_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        logger.setLevel(level)


def plain_graph_module(program: ExportedProgram, names: list[str]) -> GraphModule:
    """The exported graph in a GraphModule that pickles, flat inputs first to last, outputs as one tuple."""
    exported = program.module(check_guards=False)
    assert isinstance(exported, GraphModule)
    graph = Graph()
    values: dict[torch.fx.Node, torch.fx.Node] = {}
    output = graph.graph_copy(exported.graph, values)
    graph.output(tuple(output) if isinstance(output, (list, tuple)) else (output,))
    attributes = {
        str(node.target): exported.get_submodule(str(node.target))
        if isinstance(getattr(exported, str(node.target), None), torch.nn.Module)
        else getattr(exported, str(node.target))
        for node in graph.nodes
        if node.op in ("get_attr", "call_module")
    }
    gm = GraphModule(attributes, graph)
    placeholders = [node.name for node in graph.nodes if node.op == "placeholder"]
    gm.meta["state"] = dict(zip(placeholders, names, strict=False))
    return gm


def _guards(program: ExportedProgram, gm: GraphModule, num_state: int) -> tuple[str, ...]:
    """The conditions on input sizes under which the graph is the forward, over a list `ts` of all inputs."""
    guards = [re.sub(r"L\['ts'\]", "ts", guard) for guard in program._guards_code]
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for index, node in enumerate(placeholders):
        for dim, size in enumerate(node.meta["val"].shape):
            where = f"ts[{index}].size()[{dim}]"
            if not isinstance(size, torch.SymInt):
                guards.append(f"{where} == {int(size)}")
            elif (bounds := program.range_constraints.get(size.node.expr)) is not None:
                if bounds.lower > 0:
                    guards.append(f"{where} >= {int(bounds.lower)}")
                if bounds.upper.is_finite and bounds.upper < 2**31:
                    guards.append(f"{where} <= {int(bounds.upper)}")
    assert len(placeholders) >= num_state
    return tuple(dict.fromkeys(guards))


def _first_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300]
