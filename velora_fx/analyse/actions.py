"""What may be done about what a step keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from velora_fx.runtime import Recompute

Sizes = Mapping[tuple[str, str], int]


@dataclass(frozen=True)
class Actions:
    """What is done about saved tensors: the sub-token size of each compressed candidate by its key, and what each
    block that is named recomputes in backward."""

    sizes: Sizes = field(default_factory=dict)
    recomputed: Mapping[str, Recompute] = field(default_factory=dict)
