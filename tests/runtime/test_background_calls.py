"""Calls of a background thread: their order, what the caller waits for, and their errors."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch

from trainer.runtime.background_calls import BackgroundCalls


@pytest.mark.parametrize("threaded", [False, True])
def test_calls_are_made_in_order_and_are_over_when_settled(threaded: bool) -> None:
    made: list[int] = []
    with BackgroundCalls(threaded) as calls:
        for number in range(3 * BackgroundCalls.LIMIT):
            calls.call(partial(made.append, number))
        calls.settle()
        assert made == list(range(3 * BackgroundCalls.LIMIT))
        calls.call(partial(made.append, -1))
    assert made[-1] == -1, "leaving the context waits too"


def test_the_caller_goes_on_until_the_thread_is_too_far_behind() -> None:
    may_go, went_on = threading.Event(), threading.Event()
    with BackgroundCalls(threaded=True) as calls:
        calls.call(may_go.wait)
        for _ in range(BackgroundCalls.LIMIT - 1):
            calls.call(went_on.set)
        assert not went_on.is_set()
        may_go.set()
        # This one waits for the first.
        calls.call(went_on.set)
    assert went_on.is_set()


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_an_error_ends_the_calls_and_comes_after_the_same_call_however_fast_the_thread_is(
    error: type[BaseException],
) -> None:
    made: list[int] = []

    def fail() -> None:
        raise error("the third call")

    with pytest.raises(error, match="the third call"), BackgroundCalls(threaded=True) as calls:
        for number in range(2):
            calls.call(partial(made.append, number))
        calls.call(fail)
        for number in range(3, 2 + BackgroundCalls.LIMIT):
            calls.call(partial(made.append, number))
        made.append(100)
        calls.call(partial(made.append, 101))
        made.append(102)
    assert made == [0, 1, 100]


def test_the_thread_computes_with_as_many_threads_as_the_caller() -> None:
    before, found = torch.get_num_threads(), list[int]()
    try:
        torch.set_num_threads(3)
        with BackgroundCalls(threaded=True) as calls:
            calls.call(lambda: found.append(torch.get_num_threads()))
        assert found == [3]
    finally:
        torch.set_num_threads(before)
