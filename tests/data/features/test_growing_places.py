"""Places of growing histories on a device: after each change, every entry once, at the place that its run names."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.format.test_growing_history import PARTITIONS, grow, ordered_visits, take
from tests.data.format.test_history import write
from trainer.data.features.growing_places import GrowingPlaces
from trainer.data.format import growing_history, history
from trainer.data.format.growing_history import MOST_PLACES, GrowingHistories
from trainer.data.format.schema import DOMAINS, partition_of

NOTHING = -7
COLUMNS = ("item_id", "author_id", "request_ms", "bits", "tag")
"""Columns whose values an entry keeps."""


class Copy:
    """Columns of a device, kept up to date by the changes alone."""

    def __init__(self, histories: GrowingHistories) -> None:
        self.places, self.histories = GrowingPlaces(histories), histories
        self.columns = {name: np.zeros(0, np.int64) for name in (*COLUMNS, "domain")}
        self.moved = self.added = 0

    def update(self) -> None:
        changes = self.places.changes()
        for name, column in self.columns.items():
            new = np.full(max(changes.size, 0 if changes.afresh else len(column)), NOTHING, np.int64)
            if not changes.afresh:
                new[: len(column)] = column
            held = column.copy()
            for source, to, length in changes.moves.T.tolist():
                assert length > 0 and (new[to : to + length] == NOTHING).all(), "a place that was in use"
                new[to : to + length] = held[source : source + length]
            new[changes.added] = changes.domain if name == "domain" else self.histories.column(name)[changes.added]
            self.columns[name] = new
        self.moved, self.added = self.moved + int(changes.moves[2].sum()), self.added + len(changes.added)

    def check(self, ids: np.ndarray, as_of: int) -> int:
        """Compare all runs as of a time; return the number of their entries."""
        first, stop = self.histories.runs(ids, np.full(len(ids), as_of))
        for domain in range(len(DOMAINS)):
            left = self.places.left(first[:, domain], stop[:, domain], 4)
            np.testing.assert_array_equal(left.lengths, np.minimum(stop - first, 4)[:, domain])
            for row in range(len(ids)):
                there, here = slice(first[row, domain], stop[row, domain]), slice(left.first[row], left.stop[row])
                assert (self.columns["domain"][here] == domain).all()
                for name in COLUMNS:
                    np.testing.assert_array_equal(self.columns[name][here], self.histories.column(name)[there])
        return int((stop - first).sum())


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(0, 120),
    users=st.integers(1, 6),
    limits=st.sampled_from([(2, 1), (5, 3), (10_000, 2_500)]),
    portions=st.integers(1, 9),
    behind=st.booleans(),
)
def test_the_copy_has_the_entries_of_all_runs(tmp_path_factory, seed, n, users, limits, portions, behind):
    """Some portions come between two updates; with ``behind``, open visits end after later ones of other partitions."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 2**62, users)
    visits = ordered_visits(rng, n, ids)
    owner = partition_of(visits["user_id"], PARTITIONS)
    since, *cuts = sorted(rng.integers(0, 75 * (n + 1), portions + 1).tolist())
    with pytest.MonkeyPatch.context() as patch:
        for where in (history, growing_history):
            patch.setattr(where, "HISTORY_LIMIT", limits[0])
        patch.setattr(growing_history, "SLACK", limits[1])
        patch.setattr(growing_history, "_SPARE", seed % 4)
        growing = grow(write(tmp_path_factory.mktemp("history"), visits), since)
        copy = Copy(growing)
        for first, stop in zip([since, *cuts], cuts, strict=False):
            due = (visits["request_ms"] >= since) & (visits["known_ms"] >= first) & (visits["known_ms"] < stop)
            for partition in rng.permutation(PARTITIONS).tolist():
                growing.append(partition, take(visits, due & (owner == partition)), stop)
                if behind and rng.random() < 0.5:
                    copy.update()
            if rng.random() < 0.7:
                copy.update()
                copy.check(ids, stop)
        copy.update()
        copy.check(ids, cuts[-1])


def test_only_new_entries_are_sent_and_gaps_are_removed(tmp_path, monkeypatch):
    for where in (history, growing_history):
        monkeypatch.setattr(where, "HISTORY_LIMIT", 60)
    monkeypatch.setattr(growing_history, "SLACK", 15)
    monkeypatch.setattr(growing_history, "_SPARE", 0)
    rng = np.random.default_rng(6)
    ids = np.arange(8)
    visits = ordered_visits(rng, 6_000, ids)
    # One user comes no more, and keeps a place where the gaps are removed.
    first_user = visits["user_id"][0]
    visits["user_id"][600:][visits["user_id"][600:] == first_user] = (first_user + 1) % 8
    growing = grow(write(tmp_path, take(visits, np.arange(0)), PARTITIONS), 0)
    copy, owner = Copy(growing), partition_of(visits["user_id"], PARTITIONS)
    compacted, times = 0, np.linspace(0, 80 * 6_001, 121).astype(np.int64)
    for first, stop in itertools.pairwise(times):
        due = (visits["known_ms"] >= first) & (visits["known_ms"] < stop)
        for partition in range(PARTITIONS):
            growing.append(partition, take(visits, due & (owner == partition)), int(stop))
        size = len(copy.columns["domain"])
        copy.update()
        compacted += len(copy.columns["domain"]) < size
        assert copy.check(ids, int(stop)) > 0 or not due.any()
        # The limit and the slack of each user, and the visits of a portion.
        assert growing.places <= MOST_PLACES * (len(ids) * 75 + due.sum())
    assert compacted > 1 and copy.moved > 0
    assert copy.added == (visits["known_ms"] < times[-1]).sum(), "each visit is sent once"
