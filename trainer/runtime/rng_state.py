"""State of a rank's random number generators, which dropout and other sampling draw from."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

States = dict[str, Any]


def random_states() -> States:
    """Return the states of all generators of this process, as tensors and plain lists."""
    mersenne: Any = np.random.get_state(legacy=False)
    states: States = {
        "torch": torch.get_rng_state(),
        "numpy": [
            torch.from_numpy(mersenne["state"]["key"].astype(np.int64)),
            mersenne["state"]["pos"],
            mersenne["has_gauss"],
            mersenne["gauss"],
        ],
        "python": [list(part) if isinstance(part, tuple) else part for part in random.getstate()],
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: States) -> None:
    """Restore the result of :func:`random_states`, from a rank on the same kind of device."""
    torch.set_rng_state(states["torch"])
    words, position, has_gauss, gauss = states["numpy"]
    np.random.set_state(("MT19937", words.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, next_gauss = states["python"]
    random.setstate((version, tuple(internal), next_gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def start_random_states(seed: int, step: int, rank: int) -> None:
    """Seed all generators of a rank without stored states: in a new run, or with another number of ranks."""
    first, second, third = np.random.SeedSequence([seed, step, rank]).generate_state(3)
    torch.manual_seed(int(first))
    np.random.seed(int(second))
    random.seed(int(third))
