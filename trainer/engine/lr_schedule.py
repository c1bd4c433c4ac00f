"""Learning rates as a function of how much has been trained on: a resumed run needs nothing else, and goes on with the
same rates on another number of ranks."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate_factor(
    done: float, total: float, warmup: float, decay: Literal["constant", "linear", "cosine"]
) -> float:
    """Factor on the peak learning rates of the step that begins after ``done`` of ``total`` steps.

    It rises linearly over the first ``warmup * total`` steps, then stays at 1, or falls to 0 at ``total``. Steps are
    rows over the rows of a full step; so they need not be whole.
    """
    rise = warmup * total
    if done + 1 < rise:
        return (done + 1) / rise
    if decay == "constant":
        return 1.0
    fallen = min(1.0, max(0.0, done - rise) / max(1.0, total - rise))
    return 1 - fallen if decay == "linear" else (1 + math.cos(math.pi * fallen)) / 2
