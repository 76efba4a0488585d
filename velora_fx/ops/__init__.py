"""The operators, on any device."""

from velora_fx.ops.fold import fold
from velora_fx.ops.plain import compress_blocks
from velora_fx.ops.projections import mean_projection, sign_projection, without_wrappers

__all__ = [
    "compress_blocks",
    "fold",
    "mean_projection",
    "sign_projection",
    "without_wrappers",
]
