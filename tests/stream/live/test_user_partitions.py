"""Tests of the count of users in two partitions: exact up to a limit, and a sample beyond it."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.stream.live.user_partitions import _HASHES, UserPartitions, _hash

Pairs = list[tuple[int, int]]


def after(portions: list[Pairs], ranks: int, limit: int, restarts: bool = False) -> UserPartitions:
    """Return the counter of one rank after some portions of a stream, each divided among the ranks by partition."""
    counters = [UserPartitions(limit) for _ in range(ranks)]
    for portion in portions:
        for rank, counter in enumerate(counters):
            own = np.array([pair for pair in portion if pair[1] % ranks == rank], np.int64).reshape(-1, 2)
            counter.add(own[:, 0], own[:, 1])
        new = [counter._new for counter in counters]
        for counter in counters:
            counter.merge(new)
        if restarts:
            saved = counters[0].state_dict()
            counters = [UserPartitions(limit) for _ in range(ranks)]
            for counter in counters:
                counter.load_state_dict(saved)
    assert len({str(counter.summary()) for counter in counters}) == 1
    return counters[-1]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 40) | st.integers(0, 2**62), st.integers(0, 5)), max_size=30), max_size=6
    ),
    st.integers(1, 3),
    st.integers(1, 50),
)
def test_the_users_with_the_smallest_hashes_are_counted_exactly(portions: list[Pairs], ranks: int, limit: int) -> None:
    partitions: dict[int, set[int]] = {}
    for user, partition in (pair for portion in portions for pair in portion):
        partitions.setdefault(user, set()).add(partition)
    users = np.array(sorted(partitions), np.int64)
    kept = users[np.argsort(_hash(users))][:limit].tolist()
    bound = _HASHES if len(kept) == len(users) else int(np.sort(_hash(users))[limit])
    twice = sorted(user for user in kept if len(partitions[user]) > 1)
    for restarts in (False, True):
        counter = after(portions, ranks, limit, restarts)
        assert sorted(counter._first) == sorted(kept) and sorted(counter._second) == twice
        share = bound / _HASHES
        assert counter.summary() == {
            "seen": round(len(kept) / share),
            "in_two_partitions": round(len(twice) / share),
            "counted_share": share,
        }


def test_the_estimate_beyond_the_limit_is_close() -> None:
    rng = np.random.default_rng(1)
    users = np.unique(rng.integers(0, 10**12, 40_000))
    counter = UserPartitions(4000)
    counter.add(users, users % 4)
    counter.merge([counter._new])
    counter.add(users[:10_000], users[:10_000] % 4 + 1)
    counter.merge([counter._new])
    found = counter.summary()
    assert found["counted_share"] < 0.15
    # The standard errors are 1.5 % and 2.7 %.
    assert abs(found["seen"] / 40_000 - 1) < 0.08 and abs(found["in_two_partitions"] / 10_000 - 1) < 0.14
    assert "about " in counter.message()


def test_the_message_names_a_user_and_its_partitions() -> None:
    counter = after([[(7, 2), (8, 0)], [(7, 1)]], ranks=2, limit=10)
    assert counter.message().startswith(
        "1 of 2 users have events in two partitions (such as user 7 in 1 and 2), so labels are lost; the producer must"
    )
