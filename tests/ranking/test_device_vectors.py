"""Numbers of the vectors of a batch, found on a device without a wait of the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.device_waits import Waits
from trainer.ranking.device_vectors import first_of_each
from trainer.runtime.unique import find_unique


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [0, 1, 2, 60, 1000])
def test_keys_are_numbered_as_the_loader_numbers_them(seed: int, size: int) -> None:
    random = np.random.default_rng([seed, size])
    keys = random.integers(-1 - (seed == 1), 1 + size // (1 + seed), size)
    keys = np.where(keys < 0, -1, keys)
    with Waits() as waits:
        distinct, numbers, count = first_of_each(torch.from_numpy(keys))
    assert waits.calls == []
    unique, places = find_unique(keys)
    present = unique >= 0
    renumbered = np.where(present, np.cumsum(present) - 1, -1)
    assert int(count) == present.sum() and len(distinct) == size
    assert distinct[: int(count)].tolist() == unique[present].tolist()
    assert numbers.tolist() == (renumbered[places].tolist() if size else [])
