"""FX graphs as short lines for golden texts, and small helpers to capture and run them."""

from __future__ import annotations

import inspect
import textwrap
from collections import Counter
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from velora_fx.capture import state_of
from velora_fx.capture.export import capture
from velora_fx.passes import PREPARE, run

_SHORT = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.int64: "i64"}


def graph_text(gm: GraphModule) -> str:
    """One line a node, such as `%0: f32[4, 16] = linear(%x, %weight)`; state is called by its dotted name.

    Values are numbered in order; so are free dimensions (`s0`). A line without `%n = ` is a node whose value is unused.
    """
    names: dict[Node, str] = {}
    sizes: dict[str, str] = {}
    numbers = count()
    lines = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            names[node] = _input_name(gm, node)
            continue
        if node.op == "output":
            lines.append(f"return {_show(node.args[0], names)}")
            continue
        arguments = [_show(value, names) for value in node.args]
        arguments += [f"{key}={_show(value, names)}" for key, value in node.kwargs.items()]
        call = str(node.target) if node.op == "get_attr" else f"{_operation(node)}({', '.join(arguments)})"
        if node.users:
            names[node] = f"%{next(numbers)}"
            call = f"{names[node]}{_type(node, sizes)} = {call}"
        lines.append(call)
    return "\n".join(lines)


def golden(text: str) -> str:
    """An indented golden text without its margin."""
    return textwrap.dedent(text).strip("\n")


def prepared(module: nn.Module, *args: Any, **kwargs: Any) -> GraphModule:
    """The captured forward after the PREPARE passes."""
    return run(capture(module, args, kwargs).gm, PREPARE)


def call(gm: GraphModule, module: nn.Module, *tensors: Tensor) -> Tensor:
    """The first output of a graph of the module, run with the module's live state."""
    first: Tensor = gm(*state_of(module).values(), *tensors)[0]
    return first


def operations(gm: GraphModule) -> Counter[str]:
    """How often each operation occurs."""
    return Counter(_operation(node) for node in gm.graph.nodes if node.op == "call_function")


def gradients(y: Tensor, module: nn.Module, *tensors: Tensor) -> list[Tensor | None]:
    """Gradients of the module's parameters, then of the tensors, for an upstream that is the same at each call."""
    wanted = [t for t in (*module.parameters(), *tensors) if t.requires_grad]
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return list(torch.autograd.grad(y, wanted, upstream, allow_unused=True))


def same(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    """True if both lists hold the same tensors bit for bit, and None at the same places."""
    return len(a) == len(b) and all(
        (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y))
        for x, y in zip(a, b, strict=True)
    )


def _input_name(gm: GraphModule, node: Node) -> str:
    state = gm.meta["state"]
    if node.name in state:
        return f"%{state[node.name]}"
    if not node.name.startswith("ts_"):
        return f"%{node.name}"
    tensors = [n.name for n in gm.graph.nodes if n.op == "placeholder" and n.name.startswith("ts_")][len(state) :]
    return "%x" if len(tensors) == 1 else f"%x{tensors.index(node.name)}"


def _operation(node: Node) -> str:
    name = getattr(node.target, "__name__", str(node.target))
    if inspect.isbuiltin(node.target) or inspect.isfunction(node.target):
        return name
    namespace = getattr(node.target, "namespace", "aten")
    return name.split(".")[0] if namespace == "aten" else f"{namespace}.{name.split('.')[0]}"


def _type(node: Node, sizes: dict[str, str]) -> str:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ""
    shape = [str(size) if isinstance(size, int) else _symbol(str(size), sizes) for size in value.shape]
    return f": {_SHORT.get(value.dtype, str(value.dtype))}[{', '.join(shape)}]"


def _symbol(size: str, sizes: dict[str, str]) -> str:
    return sizes.setdefault(size, f"s{len(sizes)}")


def _show(value: Any, names: dict[Node, str]) -> str:
    if isinstance(value, Node):
        return names[value]
    if isinstance(value, (tuple, list)):
        inside = ", ".join(_show(item, names) for item in value)
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else repr(value)
