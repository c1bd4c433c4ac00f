"""Work of compiled loops in as many threads as PyTorch uses; the loops must release the interpreter's lock."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from threading import Condition
from typing import TypeVar

import numpy as np
import torch

Memory = TypeVar("Memory")


def each_part(work: Callable[[int, int], None], rows: int) -> None:
    """Call ``work(begin, end)`` for parts of ``[0, rows)`` in parallel.

    When it returns or raises, no part runs any more: a part may write to memory that the caller then frees. After an
    error of a part, or an interrupt of the caller, no further part begins.
    """
    threads = min(torch.get_num_threads(), rows)
    if threads <= 1:
        work(0, rows)
        return
    # Histories differ in length, so there are several parts for each thread: a thread that is done takes the next one.
    edges = np.linspace(0, rows, min(rows, 8 * threads) + 1).astype(int).tolist()
    parts = deque(itertools.pairwise(edges))

    def work_on_parts() -> None:
        try:
            while True:
                try:
                    begin, end = parts.popleft()
                except IndexError:
                    return
                work(begin, end)
        finally:
            parts.clear()

    others: list[Future[None]] = []
    try:
        for _ in range(threads - 1):
            others.append(_threads(os.getpid(), threads - 1).submit(work_on_parts))
        work_on_parts()
    finally:
        parts.clear()
        _wait_for(others)
    for other in others:
        other.result()


def _wait_for(others: Sequence[Future[None]]) -> None:
    """Wait until all have ended. An interrupt, such as a second Ctrl-C, is raised after that."""
    try:
        wait(others)
    except BaseException:
        _wait_for(others)
        raise


def in_turns(
    compute: Callable[[int, Memory], None], add: Callable[[int, Memory], None], pieces: int, make: Callable[[], Memory]
) -> None:
    """Compute numbered pieces of work in parallel, and add up their results one after another in their order.

    So sums are the same for any number of threads, and there are as many results at a time as threads, not as pieces.

    Args:
        compute: writes the result of a piece into the memory of a thread; pieces begin in their order.
        add: adds this result to those of the pieces before.
        pieces: number of pieces.
        make: makes the memory of a thread.
    """
    numbers = iter(range(pieces))
    turn, added, failed = Condition(), 0, False

    def work(_begin: int, _end: int) -> None:
        nonlocal added, failed
        try:
            memory = make()
            for piece in numbers:
                compute(piece, memory)
                with turn:
                    # The thread of each piece before this one is running, so its turn ends.
                    while added < piece and not failed:
                        turn.wait()
                    if failed:
                        return
                add(piece, memory)
                with turn:
                    added += 1
                    turn.notify_all()
        except BaseException:
            with turn:
                failed = True
                turn.notify_all()
            raise

    each_part(work, min(torch.get_num_threads(), pieces))


@cache
def _threads(process: int, number: int) -> ThreadPoolExecutor:
    """Return a thread pool that is kept, since starting threads takes as long as a search.

    ``process`` is the process id: a forked process must not use its parent's pool, whose threads it does not have.
    """
    return ThreadPoolExecutor(number)
