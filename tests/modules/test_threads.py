"""Work in threads: every part once, and sums in the order of the pieces."""

from __future__ import annotations

import concurrent.futures
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import pytest
import torch

import modules.threads
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


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_no_part_runs_after_an_error(error: type[BaseException], threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    ended: list[int] = []
    all_threads, awaited = threading.Barrier(threads), threading.Event()

    def wait(others: Sequence[Future[None]]) -> None:
        awaited.set()
        concurrent.futures.wait(others)

    def work(begin: int, end: int) -> None:
        begun.append(begin)
        if len(begun) <= threads:
            all_threads.wait()
        if threading.current_thread() is threading.main_thread():
            raise error("the main thread")
        # The others are in the middle of a part until the main thread waits for them.
        awaited.wait()
        ended.append(begin)

    monkeypatch.setattr(modules.threads, "wait", wait)
    try:
        with pytest.raises(error, match="the main thread"):
            each_part(work, 100)
        assert len(begun) == threads and len(ended) == threads - 1
    finally:
        awaited.set()
    found: list[int] = []
    each_part(lambda begin, end: found.extend(range(begin, end)), 100)
    assert sorted(found) == list(range(100))


def test_all_parts_have_ended_when_the_error_of_another_thread_is_raised(threads: int) -> None:
    running: set[int] = set()
    all_threads = threading.Barrier(threads)

    def work(begin: int, end: int) -> None:
        running.add(begin)
        try:
            if begin < last:  # The first part of each thread; the first thread of the pool then fails.
                all_threads.wait()
            if threading.current_thread() is not main or threads == 1:
                raise ValueError("another thread")
        finally:
            running.discard(begin)

    last, main = 100 * threads // (8 * threads), threading.main_thread()
    with pytest.raises(ValueError, match="another thread"):
        each_part(work, 100)
    assert not running


def test_a_second_interrupt_is_raised_after_the_others_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def wait(others: Sequence[int]) -> None:
        calls.append(len(others))
        if len(calls) < 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(modules.threads, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        modules.threads._wait_for([])
    assert len(calls) == 3


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
        # Other threads may still have to add their pieces when piece 7 fails; then they do not.
        assert added == list(range(7 if where == "add" else len(added))) and len(added) <= 7
