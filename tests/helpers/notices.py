"""What velora_fx says in warnings."""

from __future__ import annotations

import warnings
from collections.abc import Callable


def said_by(run: Callable[[], object]) -> list[str]:
    """The warnings of velora_fx while it runs, repeated ones too."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught if str(warning.message).startswith("velora_fx")]
