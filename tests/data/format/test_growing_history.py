"""Growing histories against the definition, however the stream is cut, saved and loaded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.format.test_history import RESULT, by_definition, check, make_visits, write
from trainer.data.format import growing_history as module
from trainer.data.format import history
from trainer.data.format.growing_history import VISIT_COLUMNS, GrowingHistories
from trainer.data.format.history import Histories
from trainer.data.format.schema import DOMAINS, partition_of

PARTITIONS = 3


def ordered_visits(rng: np.random.Generator, n: int, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Make visits in order of their ends, all at different times."""
    visits = make_visits(rng, n, ids)
    visits["known_ms"] = visits["known_ms"] * (n + 1) + rng.permutation(n)
    visits["request_ms"] *= n + 1
    order = np.argsort(visits["known_ms"])
    return {name: column[order] for name, column in visits.items()}


def take(visits: dict[str, np.ndarray], which: np.ndarray) -> dict[str, np.ndarray]:
    return {name: visits[name][which] for name in VISIT_COLUMNS}


def grow(stored: Histories, since: int, owned: list[int] | range = range(PARTITIONS)) -> GrowingHistories:
    return GrowingHistories(stored, lambda user: np.isin(partition_of(user, PARTITIONS), list(owned)), owned, since)


def feed(growing: GrowingHistories, visits: dict[str, np.ndarray], since: int, cuts: list[int], start: int) -> None:
    """Append the visits of the stream, in portions that end at ``cuts``."""
    owner = partition_of(visits["user_id"], PARTITIONS)
    for first, stop in zip([start, *cuts], cuts, strict=False):
        due = (visits["request_ms"] >= since) & (visits["known_ms"] >= first) & (visits["known_ms"] < stop)
        for partition in growing.state_dict():
            growing.append(partition, take(visits, due & (owner == partition)), stop)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(0, 80),
    users=st.integers(1, 6),
    domain=st.integers(0, 1),
    require=st.sampled_from([0, 1, 6]),
    limits=st.sampled_from([(2, 1), (5, 3), (10_000, 2_500)]),
    portions=st.integers(1, 6),
)
def test_reads_are_the_definition(tmp_path_factory, seed, n, users, domain, require, limits, portions):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 2**62, users)
    visits = ordered_visits(rng, n, ids)
    end = 75 * (n + 1)
    since, *cuts = sorted(rng.integers(0, end, portions + 1).tolist())
    saved_after = int(rng.integers(0, len(cuts)))
    with pytest.MonkeyPatch.context() as patch:
        for where in (history, module):
            patch.setattr(where, "HISTORY_LIMIT", limits[0])
        patch.setattr(module, "SLACK", limits[1])
        # Gaps are removed often, and not only from histories of thousands of visits.
        patch.setattr(module, "_SPARE", seed % 4)
        stored = write(tmp_path_factory.mktemp("history"), visits)
        before = grow(stored, since)
        feed(before, visits, since, cuts[:saved_after], since)
        states = before.state_dict()

        # Gone on by two ranks, which share the partitions in another way.
        for owned in ([0, 2], [1]):
            growing = grow(stored, since, owned)
            growing.load_state_dict(states)
            feed(growing, visits, since, cuts[saved_after:], cuts[saved_after - 1] if saved_after else since)
            asked = ids[np.isin(partition_of(ids, PARTITIONS), owned)]
            if not len(asked):
                continue
            # Reads look back from now, or from so little before that nothing of theirs is dropped yet.
            now = np.full(len(asked), cuts[-1])
            length = int(rng.integers(0, 12))
            check(visits, growing, asked, now, domain, length, require, limits[0])
            if limits[0] == 10_000:
                check(visits, growing, asked, rng.integers(0, cuts[-1] + 1, len(asked)), domain, length, require)


def test_entries_of_a_run_are_side_by_side(tmp_path):
    rng = np.random.default_rng(5)
    ids = np.arange(5)
    visits = ordered_visits(rng, 300, ids)
    since, end = 20 * 301, 80 * 301
    growing = grow(write(tmp_path, visits), since)
    feed(growing, visits, since, [*range(since + 500, end, 500), end], since)
    first, stop = growing.runs(ids, np.full(5, end))
    for user in range(5):
        for domain in range(len(DOMAINS)):
            expected = by_definition(visits, user, end, domain, 300, 0, 10_000)
            for name in RESULT:
                run = growing.column(name)[first[user, domain] : stop[user, domain]]
                np.testing.assert_array_equal(run, visits[name][expected], err_msg=name)


def test_memory_follows_what_is_kept(tmp_path, monkeypatch):
    for where in (history, module):
        monkeypatch.setattr(where, "HISTORY_LIMIT", 20)
    monkeypatch.setattr(module, "SLACK", 5)
    rng = np.random.default_rng(6)
    visits = ordered_visits(rng, 20_000, np.arange(4))
    end = 80 * 20_001
    growing = grow(write(tmp_path, take(visits, np.arange(0)), PARTITIONS), 0)
    feed(growing, visits, 0, [*range(1_000, end, 1_000), end], 0)
    assert int(growing.lengths()[1].sum()) <= 4 * 25
    assert len(growing.column("item_id")) < 2_000
    check(visits, growing, np.arange(4), np.full(4, end), 0, 50, 0, limit=20)
