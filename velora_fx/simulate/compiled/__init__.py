"""The same step as it runs under torch.compile."""

from velora_fx.simulate.compiled.block_calls import MOST_JOINED, all_calls, but_the_ends, inner_calls
from velora_fx.simulate.compiled.inductor import Inductor, Observe
from velora_fx.simulate.compiled.per_block import compile_blocks
from velora_fx.simulate.compiled.program import Apart, ObserverOf, compiled_forward, unobserved
from velora_fx.simulate.compiled.trace import Trace

__all__ = [
    "MOST_JOINED",
    "Apart",
    "Inductor",
    "Observe",
    "ObserverOf",
    "Trace",
    "all_calls",
    "but_the_ends",
    "compile_blocks",
    "compiled_forward",
    "inner_calls",
    "unobserved",
]
