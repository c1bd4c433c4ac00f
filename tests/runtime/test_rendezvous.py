"""Rendezvous of the ranks of one start in a store that earlier starts have used."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from trainer.runtime.rendezvous import fresh_part

TIMEOUTS = timedelta(seconds=600)


def meet(store: dist.Store, size: int) -> list[str]:
    """Let the ranks of one start meet, and return the value that each rank reads of a key that the first one wrote."""

    def rank(number: int) -> str:
        part = fresh_part(store, number, size, TIMEOUTS)
        if number == 0:
            part.set("who", f"start of {size}")
        return part.get("who").decode()

    with ThreadPoolExecutor(size) as ranks:
        return list(ranks.map(rank, range(size)))


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2, 2), (4, 1, 3), (1, 2, 4)])
def test_every_start_has_a_part_of_its_own(sizes: tuple[int, ...]) -> None:
    store = dist.HashStore()
    for start, size in enumerate(sizes):
        # Remains of a rank of an earlier start that died after its call, or just before its confirmation.
        for rank in range(1, size):
            if start % 2:
                store.set(f"limelight/call/{rank}", f"dead{start}")
        assert meet(store, size) == [f"start of {size}"] * size


def test_ranks_that_do_not_come_are_named() -> None:
    store = dist.HashStore()
    store.set("limelight/call/2", "dead")
    with pytest.raises(RuntimeError, match="no word from rank 1, 2 in"):
        fresh_part(store, 0, 3, timedelta(seconds=0.2))
