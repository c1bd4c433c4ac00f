"""Learning rates as a function of the step alone, so that a resumed run needs nothing but its step."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate_factor(step: int, total: int, warmup: float, decay: Literal["constant", "linear", "cosine"]) -> float:
    """Factor on the peak learning rates at optimizer step ``step`` (0-based) of ``total``.

    It rises linearly over the first ``warmup * total`` steps, then stays at 1, or falls to 0 at ``total``.
    """
    rise = math.ceil(warmup * total)
    if step < rise:
        return (step + 1) / rise
    if decay == "constant":
        return 1.0
    done = min(1.0, (step - rise) / max(1, total - rise))
    return 1 - done if decay == "linear" else (1 + math.cos(math.pi * done)) / 2
