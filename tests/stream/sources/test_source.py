"""Tests of the reader that runs ahead of training, and of positions of several ranks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator

import numpy as np
import pytest

from tests.stream.event_logs import merge_positions
from tests.stream.random_logs import SPEC
from trainer.console.errors import UserError
from trainer.stream.labels.assembled_rows import EVENT_TYPES
from trainer.stream.sources.logged_features import empty_features
from trainer.stream.sources.source import (
    EventBatch,
    Position,
    StreamReader,
    check_identity,
    starting_position,
)


class Counting:
    """Feed that counts the batches it has made."""

    def __init__(self, batches: int, fails: bool = False) -> None:
        self.position: Position = {0: [0, 0, 0, 0]}
        self.made, self.closed = 0, False
        self._batches, self._fails = batches, fails

    def batches(self, stop: threading.Event) -> Generator[EventBatch]:
        try:
            while self.made < self._batches:
                self.made += 1
                events = {name: np.full(1, self.made, dtype) for name, dtype in EVENT_TYPES.items()}
                position = {0: [self.made, 0, self.made, 0]}
                arrived_ms = np.full(1, round(time.time() * 1000))
                yield EventBatch(events, empty_features(SPEC), np.zeros(1, np.int32), arrived_ms, position)
            if self._fails:
                raise UserError("the stream broke")
        finally:
            self.closed = True

    def backlog(self, position: Position) -> tuple[int, int]:
        return self._batches - position[0][0], self._batches


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_slow_consumer_stops_the_feed():
    feed = Counting(1000)
    with StreamReader(feed, queue_batches=3) as reader:
        # Three in the queue, and one that waits for room.
        until(lambda: feed.made == 4)
        time.sleep(0.3)
        assert feed.made == 4
        assert reader.position == {0: [0, 0, 0, 0]}
        for taken in range(1, 11):
            assert reader.take() is not None
            assert reader.position == {0: [taken, 0, taken, 0]}
            assert feed.made <= taken + 4
        lag = reader.lag()
        assert (lag.waiting, lag.event_ms) == (990, 990)
    assert feed.closed
    assert reader.finished


def test_the_end_and_an_error_come_after_the_batches():
    with StreamReader(Counting(5), 2) as reader:
        assert len(list(reader)) == 5
        assert reader.finished
        assert reader.take() is None
        assert (reader.lag().waiting, reader.lag().event_ms) == (0, 0)
    with StreamReader(Counting(5, fails=True), 2) as reader:
        for _ in range(5):
            assert reader.take() is not None
        with pytest.raises(UserError, match="the stream broke"):
            reader.take()


def test_a_timeout_is_not_the_end():
    class Silent(Counting):
        def batches(self, stop: threading.Event) -> Generator[EventBatch]:
            stop.wait(600)
            yield from ()

    with StreamReader(Silent(1), 2) as reader:
        assert reader.take(timeout=0.05) is None
        assert not reader.finished


def test_positions_of_ranks_are_merged_and_divided_again():
    saved = merge_positions([{1: [7, 0, 5, 0], 3: [2, 1, 9, 4]}, {0: [1, 0, 1, 0], 2: [0, 0, 0, 0]}])
    assert list(saved) == [0, 1, 2, 3]

    def beginning(partition: int) -> list[int]:
        return [partition + 5, 0, 0, 0]

    assert starting_position([3, 0], saved, 4, beginning) == {0: [1, 0, 1, 0], 3: [2, 1, 9, 4]}
    assert starting_position([1], None, 4, beginning) == {1: [6, 0, 0, 0]}
    with pytest.raises(UserError, match="has partitions 0 to 3, the source has 0 to 7"):
        starting_position([1], saved, 8, beginning)
    with pytest.raises(UserError, match="has partitions 1, 3, the source has 0 to 3"):
        starting_position([1], {1: [0, 0, 0, 0], 3: [0, 0, 0, 0]}, 4, beginning)


def test_another_source_is_refused_with_the_difference():
    one = {"source": "kafka", "topic": "watch", "cluster": "a"}
    check_identity(one, dict(one))
    with pytest.raises(UserError, match="is of cluster 'a', the stream now has 'b'"):
        check_identity(one, {**one, "cluster": "b"})
    with pytest.raises(UserError, match="is of source 'kafka', the stream now has 'files'"):
        check_identity({"source": "kafka"}, {"source": "files"})
