"""The FX passes, one a file, each named as its function, and the runner.

A captured region goes through PREPARE; the plan's choices are then acted upon by `swap`. `find_products`,
`kept_for_backward` and `mutated_state` are analyses: they change nothing.
"""

if __name__ != "velora_fx.passes":
    raise ImportError(f"this folder is a part of velora_fx: import velora_fx.passes, not {__name__}")

from collections.abc import Callable, Sequence

from torch.fx import GraphModule

from velora_fx.passes.canonicalize import canonicalize
from velora_fx.passes.inline_state_regions import inline_state_regions

Pass = Callable[[GraphModule], GraphModule]

PREPARE: tuple[Pass, ...] = (inline_state_regions, canonicalize)


def run(gm: GraphModule, passes: Sequence[Pass]) -> GraphModule:
    """Runs the passes in order, checks the graph after each, and recompiles it once.

    Raises RuntimeError naming the pass that failed and those that ran before it.
    """
    done: list[str] = []
    for one in passes:
        name = getattr(one, "__name__", None) or one.func.__name__  # type: ignore[attr-defined]
        try:
            gm = one(gm)
            gm.graph.lint()
        except Exception as error:
            raise RuntimeError(f"pass {name} failed after {', '.join(done) or 'no other'}: {error}") from error
        done.append(name)
    gm.recompile()
    return gm
