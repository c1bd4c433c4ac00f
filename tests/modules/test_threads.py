"""Work in threads: every part once, and sums in the order of the pieces."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest
import torch

from modules.threads import each_part, in_turns


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Set a number of threads, and restore it after a test."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [0, 1, 3, 100])
def test_each_row_is_in_one_part(rows: int, threads: int) -> None:
    found: list[int] = []
    each_part(lambda begin, end: found.extend(range(begin, end)), rows)
    assert sorted(found) == list(range(rows))


@pytest.mark.parametrize("pieces", [0, 1, 3, 40])
def test_results_are_added_in_their_order_from_one_memory_for_each_thread(pieces: int, threads: int) -> None:
    waits = [random.Random(pieces).random() / 1000 for _ in range(pieces)]
    memories: list[list[int]] = []
    added: list[int] = []

    def make() -> list[int]:
        memories.append([-1])
        return memories[-1]

    def compute(piece: int, memory: list[int]) -> None:
        time.sleep(waits[piece])
        memory[0] = piece

    def add(piece: int, memory: list[int]) -> None:
        assert memory[0] == piece
        added.append(piece)

    in_turns(compute, add, pieces, make)
    assert added == list(range(pieces)) and len(memories) <= max(1, min(threads, pieces))


@pytest.mark.parametrize("where", ["compute", "add"])
def test_an_error_ends_all_threads(where: str, threads: int) -> None:
    added: list[int] = []

    def compute(piece: int, _memory: None) -> None:
        if piece == 7 and where == "compute":
            raise ValueError("piece 7")

    def add(piece: int, _memory: None) -> None:
        if piece == 7 and where == "add":
            raise ValueError("piece 7")
        added.append(piece)

    for _ in range(2):  # The pool's threads are free again.
        added.clear()
        with pytest.raises(ValueError, match="piece 7"):
            in_turns(compute, add, 20, lambda: None)
        assert added == list(range(7))
