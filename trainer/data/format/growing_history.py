"""Histories in memory that grow with a stream: visits stored before the stream began, and visits that it adds.

They have the same columns and the same reads as stored histories (``trainer.data.format.history``). The entries of a
user in a domain stay one run, which moves to a larger place when it is full. Only visits that the stream added are
saved in checkpoints; the stored visits are read again from the dataset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from trainer.data.format.history import ENTRY_COLUMNS, HISTORY_LIMIT, Histories
from trainer.data.format.id_index import IdIndex
from trainer.data.format.schema import DOMAINS
from trainer.data.format.sorting import stable_order
from trainer.data.format.validation import Columns

VISIT_COLUMNS = ("user_id", "domain", *(name for name in ENTRY_COLUMNS if name != "ordinal"))
"""Columns of a visit that is added after its end; ``known_ms`` is the end."""

SLACK = HISTORY_LIMIT // 4
"""Entries of a user beyond the limit that are kept, so that reads as of an earlier time still find enough of them."""

_SPARE = 1_000
"""Unused entries that are always allowed, however few are in use."""

MOST_PLACES = 6
"""Largest number of places for each entry: four before runs are moved, and two for each entry that moves."""

_NOBODY = -1
"""Partition of users who have not occurred in the stream yet."""


class RunChanges(NamedTuple):
    """Runs of growing histories that may have changed since they were last asked for.

    Attributes:
        run: ``[n]`` int64, numbers of the runs, which they keep: user by user, domain by domain.
        begin: ``[n]`` int64, place of the first entry of each run.
        end: ``[n]`` int64, place after the last one.
        dropped: ``[n]`` int64, number of entries that have been dropped from the beginning of each run so far.
        reordered: ``[n]`` bool, True if entries have changed their order. Otherwise a run has lost entries at its
            beginning and got others at its end, if at all.
        compacted: True if the columns are new ones, without the gaps; then these are all runs. Otherwise runs have
            moved to places that none had before.
        size: number of places in use, gaps and spare room of runs among them.
    """

    run: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    dropped: np.ndarray
    reordered: np.ndarray
    compacted: bool
    size: int


class GrowingHistories(Histories):
    """Histories of the users of a rank, in memory: about 60 bytes per visit.

    Args:
        stored: histories of the dataset.
        is_owned: function from user ids ``[n]`` to a mask ``[n]`` bool of the users that can belong to this rank; the
            stored histories of other users are not loaded.
        partitions: partitions of the stream that this rank reads.
        since_ms: beginning of the stream. Stored visits that were requested before it are loaded; each of them becomes
            visible when the stream has passed its end.
    """

    def __init__(
        self, stored: Histories, is_owned: Callable[[np.ndarray], np.ndarray], partitions: Iterable[int], since_ms: int
    ) -> None:
        self._since_ms = since_ms
        self._matches = {}
        self._users = IdIndex()
        self._begin = self._end = self._room = self._dropped = np.zeros((0, len(DOMAINS)), np.int64)
        self._owner = np.zeros(0, np.int64)
        self._entries = {name: np.zeros(0, dtype) for name, dtype in ENTRY_COLUMNS.items()}
        self._used = self._live = 0
        # Users with new entries, and those of them whose entries were sorted anew; None if nobody asks for changes.
        self._changed: list[np.ndarray] | None = None
        self._reordered: set[int] = set()
        self._compacted = False
        self._passed = dict.fromkeys(sorted(partitions), since_ms)
        self._still_open = _stored_visits(stored, is_owned, since_ms)
        self._append(self._ended_by_now())

    def append(self, partition: int, visits: Columns, until_ms: int) -> None:
        """Add visits of a partition, in order of their end.

        Args:
            partition: partition of the users.
            visits: ``VISIT_COLUMNS``.
            until_ms: watermark of the partition: with this call, all its visits that ended before have been added.
        """
        self._passed[partition] = until_ms
        self._append(_joined([self._ended_by_now(), visits]))
        self._owner[self._users.find(visits["user_id"])] = partition

    @property
    def places(self) -> int:
        """Number of places in use: entries, gaps between them and spare room; at most :data:`MOST_PLACES` an entry."""
        return self._used

    def changes(self) -> RunChanges:
        """Return the runs that may have changed since the last call; the first call returns all and begins to count."""
        users = np.arange(len(self._users))
        if self._changed is not None and not self._compacted:
            users = np.unique(np.concatenate([np.zeros(0, np.int64), *self._changed]))
        run = (users[:, None] * len(DOMAINS) + np.arange(len(DOMAINS))).reshape(-1)
        begin, end, dropped = (column.reshape(-1)[run] for column in (self._begin, self._end, self._dropped))
        reordered = np.isin(run // len(DOMAINS), list(self._reordered))
        found = RunChanges(run, begin, end, dropped, reordered, self._compacted, self._used)
        self._changed, self._reordered, self._compacted = [], set(), False
        return found

    def state_dict(self) -> dict[int, Columns]:
        """Return partition -> the visits that were added, as ``VISIT_COLUMNS``, and ``until_ms``."""
        state = {}
        for partition, until_ms in self._passed.items():
            # Visits requested before the stream began come from the dataset, which loading reads again.
            visits = self._visits(np.flatnonzero(self._owner[: len(self._users)] == partition))
            added = visits["request_ms"] >= self._since_ms
            state[partition] = {name: column[added] for name, column in visits.items()}
            state[partition]["until_ms"] = np.array([until_ms], np.int64)
        return state

    def load_state_dict(self, states: Mapping[int, Mapping[str, np.ndarray]]) -> None:
        """Restore the saved state of this rank's partitions. Call it before any visit is added.

        Args:
            states: partition -> value of :meth:`state_dict`; partitions of other ranks are ignored.
        """
        saved = {partition: states[partition] for partition in self._passed}
        self._passed = {partition: int(state["until_ms"][0]) for partition, state in saved.items()}
        parts = [{name: np.asarray(state[name]) for name in VISIT_COLUMNS} for state in saved.values()]
        self._append(_joined([self._ended_by_now(), *parts]))
        for partition, part in zip(saved, parts, strict=True):
            self._owner[self._users.find(part["user_id"])] = partition

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the users, in order of their first visit, and the numbers of their entries by domain."""
        return self._users.ids, (self._end - self._begin)[: len(self._users)]

    def _runs(self, user_id: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return begin and end of each user's entries, each ``[n, domains]``; empty for unknown users."""
        number = self._users.find(user_id)
        known = np.flatnonzero(number >= 0)
        begin, end = np.zeros((len(number), len(DOMAINS)), np.int64), np.zeros((len(number), len(DOMAINS)), np.int64)
        begin[known], end[known] = self._begin[number[known]], self._end[number[known]]
        return begin, end

    def _append(self, visits: Columns) -> None:
        """Add visits of any partitions to the runs of their users."""
        if not len(visits["user_id"]):
            return
        self._matches = {}
        number = self._users.add(visits["user_id"])
        self._add_users()
        by_time = stable_order(visits["known_ms"])
        by_user = by_time[stable_order(number[by_time])]
        users, counts = np.unique(number, return_counts=True)
        had = (self._end[users] - self._begin[users]).sum(axis=1)
        ordinal = np.empty(len(number), np.int64)
        ordinal[by_user] = np.arange(len(number)) - np.repeat(np.cumsum(counts) - counts - had, counts)

        # Users whose first new visit ended before a visit that they already have.
        behind = users[visits["known_ms"][by_user[np.cumsum(counts) - counts]] < self._last_known_ms(users)]

        run = number * len(DOMAINS) + visits["domain"]
        order = by_time[stable_order(run[by_time])]
        runs, grown = np.unique(run, return_counts=True)
        self._make_room(runs, grown)
        ends = self._end.reshape(-1)
        place = np.arange(len(run)) + np.repeat(ends[runs] - (np.cumsum(grown) - grown), grown)
        for name, column in self._entries.items():
            column[place] = (ordinal if name == "ordinal" else visits[name])[order]
        ends[runs] += grown
        self._live += len(run)
        for user in behind.tolist():
            self._restore_order(user)
        self._drop_oldest(users)
        if self._changed is not None:
            self._changed.append(users)
            self._reordered.update(behind.tolist())

    def _last_known_ms(self, users: np.ndarray) -> np.ndarray:
        """Return the end of the latest visit of each user, ``[n]``; the smallest int64 for users without visits."""
        begin, end = self._begin[users], self._end[users]
        if not end.any():
            return np.full(len(users), np.iinfo(np.int64).min)
        last = self._entries["known_ms"][np.maximum(end - 1, 0)]
        return np.where(end > begin, last, np.iinfo(np.int64).min).max(axis=1)

    def _restore_order(self, user: int) -> None:
        """Sort the visits of a user after some were appended behind later ones.

        A visit that was open when the stream began is added when all partitions have passed its end. In a live stream
        the partitions do not pass it at the same moment, so later visits can already be there.
        """
        at = ranges(self._begin[user], self._end[user] - self._begin[user])
        domain = np.repeat(np.arange(len(DOMAINS)), self._end[user] - self._begin[user])
        order = np.argsort(self._entries["known_ms"][at], kind="stable")
        self._entries["ordinal"][at[order]] = np.arange(len(at))
        within = at[order[stable_order(domain[order])]]
        for column in self._entries.values():
            column[at] = column[within]

    def _add_users(self) -> None:
        """Make room in the tables of runs for users that are new in the index."""
        if len(self._users) > len(self._begin):
            # The size doubles, so that users who arrive one by one do not each cost a copy.
            more = 2 * len(self._users) - len(self._begin)
            self._begin, self._end, self._room, self._dropped = (
                np.concatenate([column, np.zeros((more, len(DOMAINS)), np.int64)])
                for column in (self._begin, self._end, self._room, self._dropped)
            )
            self._owner = np.concatenate([self._owner, np.full(more, _NOBODY)])

    def _ended_by_now(self) -> Columns:
        """Return, once each, the visits that were open when the stream began and have ended by now."""
        # The partitions of these users are unknown here, so a visit waits until every partition has passed its end.
        waiting, now_ms = self._still_open, min(self._passed.values(), default=self._since_ms)
        ended = waiting["known_ms"] < now_ms
        self._still_open = {name: column[~ended] for name, column in waiting.items()}
        return {name: column[ended] for name, column in waiting.items()}

    def _make_room(self, runs: np.ndarray, more: np.ndarray) -> None:
        """Move each run that has no room for ``more`` entries to a place of twice the size that it needs."""
        # Moved runs leave gaps behind. Compaction when three quarters are gaps keeps its cost per visit constant.
        if self._used > 4 * self._live + _SPARE:
            self._compact()
        begin, end, room = (column.reshape(-1) for column in (self._begin, self._end, self._room))
        full = end[runs] + more > room[runs]
        runs, more = runs[full], more[full]
        lengths = end[runs] - begin[runs]
        # New runs get no spare room, because most stored histories never grow.
        sizes = np.where(lengths > 0, 2 * (lengths + more), more)
        needed = int(sizes.sum())
        first = self._used + np.cumsum(sizes) - sizes
        self._used += needed
        self._reserve(self._used)
        source, target = ranges(begin[runs], lengths), ranges(first, lengths)
        for column in self._entries.values():
            column[target] = column[source]
        # Searches by behaviour look at the bits of all entries; those that are no longer used must not match.
        self._entries["bits"][source] = 0
        begin[runs], end[runs], room[runs] = first, first + lengths, first + sizes

    def _reserve(self, size: int) -> None:
        """Grow the columns to at least ``size`` entries."""
        capacity = len(self._entries["item_id"])
        if size > capacity:
            for name, column in self._entries.items():
                grown = np.zeros(max(size, capacity + capacity // 2), column.dtype)
                grown[: len(column)] = column
                self._entries[name] = grown

    def _drop_oldest(self, users: np.ndarray) -> None:
        """Drop the oldest entries of users who have more than any read considers."""
        total = (self._end[users] - self._begin[users]).sum(axis=1)
        users, total = users[total > HISTORY_LIMIT + SLACK], total[total > HISTORY_LIMIT + SLACK]
        for user, drop in zip(users.tolist(), (total - HISTORY_LIMIT).tolist(), strict=True):
            for domain in range(len(DOMAINS)):
                begin, end = int(self._begin[user, domain]), int(self._end[user, domain])
                # The ordinals of a run increase, so those to drop are a prefix of it.
                ordinal = self._entries["ordinal"][begin:end]
                gone = int(np.searchsorted(ordinal, drop))
                ordinal -= drop
                self._entries["bits"][begin : begin + gone] = 0
                self._begin[user, domain] += gone
                self._dropped[user, domain] += gone
                self._live -= gone

    def _compact(self) -> None:
        """Copy all runs into new columns without gaps between them."""
        lengths = (self._end - self._begin).reshape(-1)
        source = ranges(self._begin.reshape(-1), lengths)
        self._entries = {name: column[source] for name, column in self._entries.items()}
        self._end = np.cumsum(lengths).reshape(self._end.shape)
        self._begin, self._room = self._end - lengths.reshape(self._end.shape), self._end.copy()
        self._used = self._live = len(source)
        self._compacted = self._changed is not None

    def _visits(self, users: np.ndarray) -> Columns:
        """Return all entries of some users (by number) as ``VISIT_COLUMNS``, each user's in order of their end."""
        begin, lengths = self._begin[users].reshape(-1), (self._end - self._begin)[users].reshape(-1)
        at = ranges(begin, lengths)
        columns = {name: self._entries[name][at] for name in ENTRY_COLUMNS}
        columns["user_id"] = np.repeat(np.repeat(self._users.ids[users], len(DOMAINS)), lengths)
        columns["domain"] = np.repeat(np.tile(np.arange(len(DOMAINS), dtype=np.uint8), len(users)), lengths)
        user = np.repeat(np.repeat(np.arange(len(users)), len(DOMAINS)), lengths)
        order = np.lexsort((columns["ordinal"], user))
        return {name: columns[name][order] for name in VISIT_COLUMNS}


def _stored_visits(stored: Histories, is_owned: Callable[[np.ndarray], np.ndarray], since_ms: int) -> Columns:
    """Return the stored visits requested before a time, of some users, as ``VISIT_COLUMNS`` in order of their end."""
    user_id, _ = stored.lengths()
    user_id = user_id[is_owned(user_id)]
    parts = []
    for domain in range(len(DOMAINS)):
        begin, end = (ends[:, domain] for ends in stored._runs(user_id))
        at = ranges(begin, end - begin)
        user = np.repeat(user_id, end - begin)
        before = stored.column("request_ms")[at] < since_ms
        at, user = at[before], user[before]
        parts.append(
            {
                "user_id": user,
                "domain": np.full(len(at), domain, np.uint8),
                **{name: stored.column(name)[at] for name in ENTRY_COLUMNS if name != "ordinal"},
            }
        )
    visits = _joined(parts)
    order = np.argsort(visits["known_ms"], kind="stable")
    return {name: column[order] for name, column in visits.items()}


def _joined(parts: Sequence[Mapping[str, np.ndarray]]) -> Columns:
    """Return the visits of all parts, one part after the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in VISIT_COLUMNS}


def ranges(first: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the positions ``first[k], first[k] + 1, ...`` for all k, ``lengths[k]`` each, ``[lengths.sum()]``."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - (ends - lengths), lengths)
