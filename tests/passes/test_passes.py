"""The runner checks the graph after each pass and says which one failed; the folder has one name."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from tests.helpers.graph_text import call, operations, prepared
from velora_fx.passes import PREPARE, run
from velora_fx.passes.canonicalize import canonicalize
from velora_fx.passes.inline_state_regions import inline_state_regions
from velora_fx.passes.swap import swap

ROOT = Path(__file__).parents[2]


def graph() -> GraphModule:
    return prepared(nn.Linear(4, 4), torch.zeros(2, 4))


def unchanged(gm: GraphModule) -> GraphModule:
    return gm


def failing(gm: GraphModule) -> GraphModule:
    raise KeyError("no such node")


def disorderly(gm: GraphModule) -> GraphModule:
    """Leaves a graph in which a node is used before it is made."""
    output = next(node for node in gm.graph.nodes if node.op == "output")
    next(iter(gm.graph.nodes)).prepend(output.args[0][0])
    return gm


def doubled(gm: GraphModule, factor: int) -> GraphModule:
    output = next(node for node in gm.graph.nodes if node.op == "output")
    with gm.graph.inserting_before(output):
        output.args = ((gm.graph.call_function(torch.mul, (output.args[0][0], factor)),),)
    return gm


FAILING: dict[str, tuple[list[Any], str]] = {
    "last": (
        [unchanged, canonicalize, failing, unchanged],
        "failing failed after unchanged, canonicalize: .*no such",
    ),
    "first": ([failing], "failing failed after no other"),
    "that breaks the graph": ([unchanged, disorderly, unchanged], "disorderly failed after unchanged"),
    "with bound arguments": ([partial(swap, choices=None)], "swap failed after no other"),
}


@pytest.mark.parametrize("which", FAILING)
def test_a_pass_that_fails_is_named_with_those_before_it(which):
    passes, message = FAILING[which]
    with pytest.raises(RuntimeError, match=f"^pass {message}") as caught:
        run(graph(), passes)
    assert isinstance(caught.value.__cause__, KeyError) == (failing in passes)


def test_the_passes_run_in_order_and_the_code_is_that_of_the_last_graph():
    module, x = nn.Linear(4, 4), torch.ones(2, 4)
    gm = run(prepared(module, x), [partial(doubled, factor=2), partial(doubled, factor=3)])
    assert operations(gm)["mul"] == 2
    assert torch.equal(call(gm, module, x), module(x) * 2 * 3)


def test_without_passes_the_graph_is_the_one_given():
    gm = graph()
    assert run(gm, []) is gm


def test_state_is_written_out_before_products_are_rewritten():
    """A product inside a wrapped stretch is not a node of the graph yet."""
    assert PREPARE.index(inline_state_regions) < PREPARE.index(canonicalize)


@pytest.mark.parametrize("name", ["passes", "passes.canonicalize"])
def test_the_folder_cannot_be_imported_under_another_name(name):
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "ImportError" in done.stderr and "velora_fx.passes" in done.stderr.splitlines()[-1]
