"""What an approximation costs: the price of sub-tokens by their size, in the currency of recompute, time.

`SHARES` is written by `python tools/quality --publish` from the training runs in tools/results/quality.jsonl: how much
longer one must train to make up for the loss that sub-tokens of a size cost. docs/quality.md has the runs, what they
show, and what they do not.
"""

from __future__ import annotations

import math

import numpy as np

# If all weights had sub-tokens of this size: the share of the step's time that it is worth to avoid that.
SHARES = {1: 0, 2: 0.0033, 4: 0.0067, 8: 0.01, 16: 0.197, 32: 0.2705}
# The largest size that is offered at first, and then each time that the budget is not met at a fair price.
STEPS = (8, 16, 32, 64, 128)
FAIR_SHARE = 0.25  # of the step's time that recompute may take before larger sub-tokens are offered


def share_of(size: int) -> float:
    """The price of sub-tokens of a size for all weights, as a share of the step's time; it grows with every size."""
    known = np.log2(list(SHARES))
    beyond = max(0.0, math.log2(size) - float(known[-1]))
    return float(np.interp(math.log2(size), known, list(SHARES.values()))) * 2**beyond
