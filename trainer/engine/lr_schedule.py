"""Learning rate schedule as a function of the rows trained on.

A resumed run needs no other state, and has the same rates on another number of ranks.
"""

from __future__ import annotations

import math
from typing import Literal


def learning_rate_factor(
    done: float, total: float, warmup: float, decay: Literal["constant", "linear", "cosine"]
) -> float:
    """Return the factor on the peak learning rates for the step that begins after ``done`` of ``total`` steps.

    The factor rises linearly over the first ``warmup * total`` steps. Then it stays at 1, or falls to 0 at ``total``.
    Steps are rows divided by the rows of a full step, so they need not be whole numbers.
    """
    rise = warmup * total
    if done + 1 < rise:
        return (done + 1) / rise
    if decay == "constant":
        return 1.0
    fallen = min(1.0, max(0.0, done - rise) / max(1.0, total - rise))
    return 1 - fallen if decay == "linear" else (1 + math.cos(math.pi * fallen)) / 2
