"""Tests of the check of a topic: it decides as a plain reference, however the log is cut, and from every start."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.stream import StreamConfig
from trainer.console.errors import UserError
from trainer.data.format.schema import partition_of
from trainer.data.format.validation import Columns
from trainer.stream.sources import topic_check
from trainer.stream.sources.logged_features import RequestFeatures
from trainer.stream.sources.message_codec import DecodedMessages, RejectedEvent
from trainer.stream.sources.topic_check import TopicCheck

CONFIG = StreamConfig(source="kafka", brokers="b", topic="t")
WINDOW = 24

Log = list[tuple[int, str]]
"""User and kind of each message of a partition: ``right``, ``misplaced`` or ``broken``."""


def decoded(log: Log) -> DecodedMessages:
    """Return messages of one event each."""
    right = np.array([at for at, (_, kind) in enumerate(log) if kind == "right"], np.int64)
    events: Columns = {"user_id": np.array([log[at][0] for at in right], np.int64)}
    rejected = [
        RejectedEvent(at, 0, kind, *((1, user) if kind == "misplaced" else ()))
        for at, (user, kind) in enumerate(log)
        if kind != "right"
    ]
    none = RequestFeatures(*[np.empty(0, np.int64)] * 4)
    return DecodedMessages(events, right, np.zeros(len(right), np.int64), none, np.ones(len(log), np.int64), rejected)


def refused(window: Log, partitions: int) -> bool:
    """Decide a window in the plainest way."""
    misplaced = {user for user, kind in window if kind == "misplaced"}
    right = {user for user, kind in window if kind == "right"}
    ratio = math.prod([(1 - 1 / partitions) / 0.05] * len(misplaced) + [1 / partitions / 0.95] * len(right))
    rejected = sum(kind != "right" for _, kind in window)
    return ratio >= 1e6 or (2 * rejected > len(window) >= WINDOW // 4)


def reference(log: Log, partitions: int) -> int | None:
    """Return the number of messages after which a log is refused, if they all are there at the start."""
    for stop in range(min(WINDOW, len(log)), len(log) + 1):
        window = log[max(0, stop - WINDOW) : stop]
        judged = stop == min(WINDOW, len(log)) or window[-1][1] != "right"
        if judged and refused(window, partitions):
            return stop
    return None


def decide(log: Log, partitions: int, start: int, cuts: list[int]) -> bool:
    """Decide a log as a reader that starts at an offset, and reads portions."""
    check = TopicCheck(CONFIG, partitions)
    ((first, end),) = check.ranges({0: start}, {0: (0, len(log))}, resumed=start > 0).values()
    edges = sorted({start, *(cut for cut in cuts if start < cut < len(log)), len(log)})
    try:
        for begin, stop in [(first, end), *pairwise(edges)]:
            offset = np.arange(begin, stop)
            if begin < stop:
                check.add(np.zeros(len(offset), np.int64), offset, decoded(log[begin:stop]))
    except UserError:
        return True
    return False


@st.composite
def logs(draw: st.DrawFn) -> Log:
    """Return a log of stretches, each with its share of misplaced and broken messages."""
    log: Log = []
    for _ in range(draw(st.integers(1, 4))):
        kinds = draw(st.sampled_from(["r", "rrrrrm", "rm", "m", "rrb", "b", "rmb"]))
        users = draw(st.sampled_from([2, 8, 1000]))
        random = draw(st.randoms(use_true_random=False))
        for _ in range(draw(st.integers(0, 40))):
            kind = {"r": "right", "m": "misplaced", "b": "broken"}[random.choice(kinds)]
            log.append((2 * random.randrange(users) + (kind == "misplaced"), kind))
    return log


@settings(max_examples=300, deadline=None)
@given(logs(), st.integers(2, 9), st.lists(st.integers(1, 150), max_size=5), st.integers(0, 100))
def test_the_decision_is_that_of_a_plain_reference_from_every_start(
    log: Log, partitions: int, cuts: list[int], start: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(topic_check.WINDOW, "json", WINDOW)
        stop = reference(log, partitions)
        assert decide(log, partitions, 0, cuts) == (stop is not None)
        # A reader can start only where an earlier one has come to, and then decides as that would have.
        start = min(start, len(log) if stop is None else max(0, stop - 1))
        assert decide(log, partitions, start, cuts) == (stop is not None)


@pytest.mark.parametrize("partitions", [2, 3, 16, 500])
def test_another_partitioner_is_told_from_a_few_misplaced_users(partitions: int) -> None:
    rng = np.random.default_rng(partitions)
    for attempt in range(10):
        user = rng.permutation(10**6)[:2000]
        kinds = np.where(partition_of(user, partitions) == 0, "right", "misplaced")
        log: Log = list(zip(user.tolist(), kinds.tolist(), strict=True))
        if attempt % 2:
            # A topic of our own partitioner, of which 5 % of the users are misplaced.
            right, wrong = ([entry for entry in log if entry[1] == kind] for kind in ("right", "misplaced"))
            log = right + wrong[: len(right) // 19]
            rng.shuffle(log)
            log = [(int(each), str(kind)) for each, kind in log]
        check = TopicCheck(CONFIG, partitions)
        try:
            check.add(np.zeros(len(log), np.int64), np.arange(len(log)), decoded(log))
            assert attempt % 2
        except UserError as error:
            assert not attempt % 2 and "the topic has another partitioner" in str(error)


def test_messages_before_the_start_of_a_new_job_do_not_count() -> None:
    log: Log = [(user, "misplaced") for user in range(1500)] + [(user, "right") for user in range(2000, 2500)]
    position, held = {0: 1500}, {0: (0, 2000)}
    assert TopicCheck(CONFIG, 4).ranges(position, held, resumed=False) == {0: (1500, 2000)}
    for start in (1500, 1600):
        # The job resumes soon after its start, so that it reads messages from before the start.
        check = TopicCheck(CONFIG, 4)
        ((first, end),) = check.ranges({0: start}, held, resumed=True).values()
        assert (first, end) == (start - 1000, start)
        for begin, stop in ((first, end), (end, 2000)):
            check.add(np.zeros(stop - begin, np.int64), np.arange(begin, stop), decoded(log[begin:stop]))


def test_one_user_is_no_evidence_of_another_partitioner() -> None:
    check = TopicCheck(CONFIG, 4)
    log: Log = [(7, "misplaced")] * 200 + [(8, "right")]
    check.add(np.zeros(201, np.int64), np.arange(201), decoded(log))


def test_the_first_event_stands_for_its_message() -> None:
    rejected = [RejectedEvent(0, 1, "r", 2, 90), RejectedEvent(1, 0, "r", 2, 91), RejectedEvent(2, 0, "broken")]
    events = {"user_id": np.array([5, 6, 7])}
    none = RequestFeatures(*[np.empty(0, np.int64)] * 4)
    message, inside = np.array([0, 0, 1]), np.array([0, 2, 1])
    evidence = topic_check._evidence_of(
        np.arange(4), DecodedMessages(events, message, inside, none, np.array([3, 2, 1, 1]), rejected)
    )
    assert evidence.user.tolist() == [5, 91, -1, -1]
    assert evidence.misplaced.tolist() == [False, True, False, False]
    assert evidence.rejected.tolist() == [False, False, True, False]
