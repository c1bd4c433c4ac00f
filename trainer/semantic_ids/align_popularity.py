"""Positive pairs of the training range by author and time: popularity for the correction, and who was trained on.

``log Q`` of a row is computed from positives whose rows were emitted before the row's request. So it is the same in
every order of reading, on any number of ranks and after a resume.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from trainer.console.errors import UserError
from trainer.data.format.dataset import Dataset
from trainer.data.format.schema import Rows
from trainer.data.format.time_selection import Selection
from trainer.runtime.checksums import verify_checksums, write_checksums
from trainer.runtime.stored_files import load_array

_FILES = ("authors.npy", "bounds.npy", "emit_ms.npy")

BUCKETS = ("unseen", "rarest quarter", "second quarter", "third quarter", "most popular quarter")


def positive_rows(rows: Rows, columns: Sequence[int]) -> np.ndarray:
    """Return True for rows with one of the behaviours in ``columns``, ``[n]`` bool."""
    return np.asarray((rows["label"] & rows["mask"])[:, list(columns)].any(axis=1))


@dataclass(frozen=True)
class AuthorPopularity:
    """Authors with rows in the training range, and their positives.

    Attributes:
        authors: ``[a]`` int64, ascending.
        bounds: ``[a + 1]`` int64; author k has ``emit_ms[bounds[k]:bounds[k + 1]]``.
        emit_ms: ``[p]`` int64, times of the positives, ascending for each author.
    """

    authors: np.ndarray
    bounds: np.ndarray
    emit_ms: np.ndarray
    _in_time: np.ndarray = field(init=False, repr=False)
    _firsts: np.ndarray = field(init=False, repr=False)
    _keys: np.ndarray = field(init=False, repr=False)
    _ends: dict[int, np.ndarray] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        in_time = np.sort(self.emit_ms)
        firsts = np.sort(self.emit_ms[self.bounds[:-1][np.diff(self.bounds) > 0]])
        # Author and time as one sorted integer, so that one binary search finds both.
        author = np.repeat(np.arange(len(self.authors)), np.diff(self.bounds))
        keys = author * self._span + (self.emit_ms - self._least)
        for name, value in (("_in_time", in_time), ("_firsts", firsts), ("_keys", keys)):
            object.__setattr__(self, name, value)

    @staticmethod
    def count(data: Dataset, selection: Selection, columns: Sequence[int]) -> AuthorPopularity:
        """Count the positives of a training range in one pass; ``columns`` are those of their behaviours."""
        shown, positive, emit = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for rows in _selected(data, selection):
            chosen = positive_rows(rows, columns)
            shown.append(np.unique(rows["author_id"]))
            positive.append(rows["author_id"][chosen])
            emit.append(rows["emit_ms"][chosen])
        author, emit_ms = np.concatenate(positive), np.concatenate(emit)
        order = np.lexsort((emit_ms, author))
        authors = np.unique(np.concatenate(shown))
        bounds = np.append(np.searchsorted(author[order], authors), len(author))
        return AuthorPopularity(authors, bounds, emit_ms[order])

    def save(self, directory: Path) -> None:
        """Write the arrays and their checksums."""
        for name, values in zip(_FILES, (self.authors, self.bounds, self.emit_ms), strict=True):
            np.save(directory / name, values)
        write_checksums(directory, _FILES)

    @staticmethod
    def load(directory: Path) -> AuthorPopularity:
        """Read the files of :meth:`save`.

        Raises:
            UserError: a file is missing or damaged.
        """
        verify_checksums(directory, _FILES)
        try:
            arrays = [load_array(directory / name, 1, np.dtype(np.int64)) for name in _FILES]
        except FileNotFoundError as error:
            raise UserError(f"{directory}: not a run of `limelight align` ({error.filename} is missing)") from None
        return AuthorPopularity(*arrays)

    def known(self, authors: np.ndarray) -> np.ndarray:
        """Return True for authors with a positive in the training range, ``[n]`` bool: no other row is trained on."""
        return self.totals(authors) > 0

    def totals(self, authors: np.ndarray) -> np.ndarray:
        """Return the number of positives of each author in the training range, ``[n]`` int64."""
        place = self._place(authors)
        return np.where(place >= 0, np.diff(self.bounds)[place], 0) if len(self.authors) else np.zeros_like(place)

    def log_q(
        self, authors: np.ndarray, as_of_ms: np.ndarray, smoothing: float, window_ms: int | None = None
    ) -> np.ndarray:
        """Return the log of each author's share of the positives that were emitted before a time, ``[n]`` float32.

        With n_a of N positives so far, A authors with at least one, and s = ``smoothing``, the share is

            (n_a + s) / (N + s (A + 1))

        With a window only its positives count, and N are those after the author's first one in the window. This first
        one says that the author is on air, and no more, so it is not counted itself:

            (n_a - 1 + s) / (N + s (A + 1)),     1 / (A + 1) if the author has none

        Args:
            authors: ``[n]`` int64.
            as_of_ms: ``[n]`` int64.
            smoothing: s, above 0.
            window_ms: length of the time before ``as_of_ms`` that counts; None for all of it.
        """
        own = np.zeros(len(authors), np.int64)
        place = self._place(authors)
        known = np.flatnonzero(place >= 0)
        own[known] = self._before(place[known], as_of_ms[known])
        everyone = np.searchsorted(self._in_time, as_of_ms)
        if window_ms is None:
            shown = np.searchsorted(self._firsts, as_of_ms)
        else:
            shown = everyone - np.searchsorted(self._last_times(window_ms), as_of_ms)
            earlier = self._before(place[known], as_of_ms[known] - window_ms)
            some, first = own[known] > earlier, self.bounds[place[known]] + earlier
            own[known] = np.maximum(own[known] - earlier - 1, 0)
            since = np.zeros_like(everyone)
            chosen = known[some]
            since[chosen] = everyone[chosen] - np.searchsorted(self._in_time, self.emit_ms[first[some]]) - 1
            everyone = since
        return (np.log(own + smoothing) - np.log(everyone + smoothing * (shown + 1))).astype(np.float32)

    def buckets(self, authors: np.ndarray) -> np.ndarray:
        """Return the place in :data:`BUCKETS` of each author, ``[n]`` int64: authors in four quarters by positives."""
        totals = np.diff(self.bounds)
        rank = np.empty(len(totals), np.int64)
        rank[np.lexsort((self.authors, totals))] = np.arange(len(totals))
        place = self._place(authors)
        return np.where(place >= 0, 1 + rank[place] * 4 // len(rank), 0) if len(rank) else np.zeros_like(place)

    @property
    def _least(self) -> int:
        """Time of the first positive."""
        return int(self.emit_ms.min()) if len(self.emit_ms) else 0

    @property
    def _span(self) -> int:
        """Number that no difference of two times of positives reaches."""
        return int(self.emit_ms.max()) - self._least + 2 if len(self.emit_ms) else 1

    def _last_times(self, window_ms: int) -> np.ndarray:
        """Return the last time at which each positive is its author's latest one in a window, ascending, ``[p]``."""
        if window_ms not in self._ends:
            ends = self.emit_ms + window_ms
            after = np.ones(len(ends), bool)
            after[self.bounds[1:][np.diff(self.bounds) > 0] - 1] = False
            place = np.flatnonzero(after)
            ends[place] = np.minimum(ends[place], self.emit_ms[place + 1])
            self._ends[window_ms] = np.sort(ends)
        return self._ends[window_ms]

    def _place(self, authors: np.ndarray) -> np.ndarray:
        """Return the place of each author, -1 for one without rows."""
        if not len(self.authors):
            return np.full(len(authors), -1)
        place = np.minimum(np.searchsorted(self.authors, authors), len(self.authors) - 1)
        return np.where(self.authors[place] == authors, place, -1)

    def _before(self, place: np.ndarray, as_of_ms: np.ndarray) -> np.ndarray:
        """Return the number of positives of each author that were emitted before a time."""
        wanted = place * self._span + np.clip(as_of_ms - self._least, 0, self._span - 1)
        return np.searchsorted(self._keys, wanted) - self.bounds[place]


def _selected(data: Dataset, selection: Selection) -> Iterator[Rows]:
    """Yield the columns of the selected rows that popularity needs, record by record."""
    columns = ["author_id", "emit_ms", "request_ms", "label", "mask"]
    for partition in range(data.store.partitions):
        for record in np.flatnonzero(selection.touches(data.store.records(partition))).tolist():
            rows = data.store.read(partition, record, columns)
            if rows is not None:
                kept = selection.mask(rows)
                yield {name: column[kept] for name, column in rows.items()}
