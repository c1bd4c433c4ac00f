"""User histories: the visits of each user, read as of a given time.

``history/*.npy`` are flat, memory-mapped columns with one entry for each visit that was watched or had a behaviour.
Entries lie partition after partition, and within a partition they are sorted by (user, domain, ``known_ms``). So the
latest visits of a user in a domain are one run of entries. ``user_id.npy`` (sorted) and ``offsets.npy``
``[users, domains + 1]`` give the place of each run. Datasets from before tags existed have no ``tag.npy``.

A visit is known from its end on: ``known_ms`` is its ``exit_ms``. Every read takes a time and returns only entries with
``known_ms < as_of_ms``, so no read leaks information from the future.

The searches trust the offsets, and compiled kernels read at them without a check. So opening histories checks that the
columns have their types and equal lengths, that the runs of all users cover the entries exactly once, and that times
rise in each run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from trainer.console.errors import UserError
from trainer.console.outputs import local_path
from trainer.data.format import storage
from trainer.data.format.dataset_files import DatasetFiles
from trainer.data.format.schema import DOMAINS, DatasetSpec, partition_of
from trainer.data.format.sorting import stable_order
from trainer.runtime.files import set_usual_modes
from trainer.runtime.stored_files import file_inside, load_array

FOLDER = "history"

HISTORY_LIMIT = 10_000
"""Number of latest visits of a user, over all domains, that a read considers."""

MAX_BEHAVIOURS = 31
"""Number of behaviours that fit into the ``bits`` of an entry."""

ENTRY_COLUMNS: dict[str, np.dtype] = {
    "item_id": np.dtype(np.int64),
    "author_id": np.dtype(np.int64),
    "request_ms": np.dtype(np.int64),
    "play_ms": np.dtype(np.int64),
    "bits": np.dtype(np.int32),
    "known_ms": np.dtype(np.int64),
    # Position among the user's entries of all domains; it implements HISTORY_LIMIT.
    "ordinal": np.dtype(np.int32),
    "tag": np.dtype(np.int32),
}
USER_COLUMNS = ("user_id", "offsets")
"""Columns with one row for each user."""
_LATER_COLUMNS = frozenset({"tag"})
"""Columns that older datasets do not have; there all entries are 0."""
_CHECKED_ENTRIES = 1 << 20
"""Number of entries whose times are checked at a time."""

_RESULT_COLUMNS = ("item_id", "author_id", "request_ms", "play_ms", "bits", "tag")


@dataclass(frozen=True)
class HistorySlice:
    """Entries from the histories of n users: user after user, and the oldest entry of each user first.

    Attributes:
        lengths: number of entries of each user, ``[n] int64``.
        item_id: item of each entry, ``[lengths.sum()] int64``; the following columns have the same length.
        author_id: int64.
        request_ms: int64, start of the visit.
        play_ms: int64, time watched.
        bits: int32, bit k is set if ``spec.behaviours[k]`` happened during the visit.
        tag: int32, feature ``spec.tag`` of the item; 0 if there is none.
        domain: uint8, code of the domain.
    """

    lengths: np.ndarray
    item_id: np.ndarray
    author_id: np.ndarray
    request_ms: np.ndarray
    play_ms: np.ndarray
    bits: np.ndarray
    tag: np.ndarray
    domain: np.ndarray


def _ignore(size: int) -> None:
    """Report no progress."""


class Histories:
    """Memory-mapped histories of a dataset. The object can be pickled and used in forked processes.

    Histories on a URL are first copied to a cache directory of this machine (``LIMELIGHT_CACHE``, by default
    ``~/.cache/limelight``), once for each version of the dataset.

    Args:
        path: dataset, a local path or an fsspec URL.
        spec: description of the dataset.

    Raises:
        UserError: the dataset has no histories, they cannot be read, or their columns do not fit together.
    """

    def __init__(self, path: str | Path, spec: DatasetSpec) -> None:
        files = DatasetFiles(path)
        self._open(_cached(files, spec) if storage.is_remote(path) else Path(files.locate(FOLDER)))
        if spec.tag:
            # Only datasets without tags may have no such file.
            _map_column(self._folder, "tag")
        try:
            self._check(spec.partitions)
        except UserError:
            # Columns that do not fit together do not tell which of them is damaged; checksums do.
            self.verify(files, self.file_names)
            raise

    def __reduce__(self) -> tuple[Callable, tuple[Any, ...]]:
        return _reopen, (self._folder,)

    def latest(
        self, user_id: np.ndarray, as_of_ms: np.ndarray, *, domain: int, length: int, require: int = 0
    ) -> HistorySlice:
        """Return the latest visits of each user in one domain, as known before a time.

        The read considers the user's last ``HISTORY_LIMIT`` visits (over all domains) that ended strictly before
        ``as_of_ms``. It returns the latest ``length`` of those in the domain.

        Args:
            user_id: ``[n] int64``; unknown users have an empty history.
            as_of_ms: ``[n] int64``, milliseconds UTC.
            domain: code of the domain.
            length: largest number of visits per user.
            require: return only visits with at least one of these behaviour bits; 0 returns all.
        """
        first, stop = (ends[:, 0] for ends in self._known(user_id, as_of_ms, (domain,)))
        if require:
            # From here on first and stop are positions among the matching entries only.
            matching = self._matching(require)
            stop = _search(matching, stop)
            first = bisect_runs(matching, np.maximum(stop - length, 0), stop, first)
        first = np.maximum(first, stop - length)
        lengths = stop - first
        ends = np.cumsum(lengths)
        at = np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - (ends - lengths), lengths)
        if require:
            at = matching[at]
        return self.take(at, lengths, np.full(len(at), domain, np.uint8))

    def runs(self, user_id: np.ndarray, as_of_ms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the runs of entries that hold the histories of users, as known before a time.

        Entries ``[first, stop)`` of :meth:`column` are the visits of a user in one domain, in order of their end. They
        ended strictly before ``as_of_ms`` and are among the user's last ``HISTORY_LIMIT`` visits over all domains.

        Args:
            user_id: ``[n] int64``; unknown users have empty runs.
            as_of_ms: ``[n] int64``, milliseconds UTC.

        Returns:
            ``first`` and ``stop``, each ``[n, domains] int64``.
        """
        return self._known(user_id, as_of_ms, range(len(DOMAINS)))

    def column(self, name: str) -> np.ndarray:
        """Return a column of all entries, ``[entries]``, which callers must not change.

        The columns are ``item_id``, ``author_id``, ``request_ms``, ``play_ms``, ``bits`` and ``tag`` as in
        :class:`HistorySlice`, ``known_ms`` (int64), the end of a visit, and ``ordinal`` (int32), the position of an
        entry among all visits of its user. Only the entries in :meth:`runs` were known at a time.
        """
        return self._entries[name]

    def stored_runs(self, partitions: int) -> np.ndarray:
        """Return the runs of all users in the order in which they are stored, partition after partition.

        Args:
            partitions: number of partitions of the dataset.

        Returns:
            ``[users, domains + 1] int64``: the runs of a user are ``[k, k + 1]`` of its line, and no entry is between
            two lines.
        """
        # The table of users is in order of their ids, entries lie partition after partition.
        return self._offsets[stable_order(partition_of(self._user_id, partitions))]

    def take(self, at: np.ndarray, lengths: np.ndarray, domain: np.ndarray) -> HistorySlice:
        """Return entries by their position in the columns.

        Args:
            at: positions, user after user, ``[lengths.sum()]`` int64.
            lengths: number of entries of each user, ``[n]`` int64.
            domain: codes of the domains of the entries, uint8.
        """
        return HistorySlice(
            lengths=lengths,
            **{name: np.take(self._entries[name], at, mode="clip") for name in _RESULT_COLUMNS},
            domain=domain,
        )

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the users, ``[users] int64``, and the number of their entries by domain, ``[users, domains] int64``.

        Entries of all times count, so this is for descriptions of the dataset and must not become a feature.
        """
        return self._user_id, np.diff(self._offsets, axis=1)

    def _known(
        self, user_id: np.ndarray, as_of_ms: np.ndarray, domains: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return ``first`` and ``stop`` for some domains, each ``[n, len(domains)]``; see :meth:`runs`."""
        begin, end = self._runs(user_id)
        first = begin[:, list(domains)]
        stop = np.stack([self._known_until(begin, end, domain, as_of_ms) for domain in domains], axis=1)
        # The limit counts visits of all domains. That search is needed only for users who have more than the limit.
        long = np.flatnonzero((end - begin).sum(axis=1) > HISTORY_LIMIT)
        if len(long):
            b, e = begin[long], end[long]
            known = sum(self._known_until(b, e, d, as_of_ms[long]) - b[:, d] for d in range(len(DOMAINS)))
            ordinal = self._entries["ordinal"]
            for place in range(len(domains)):
                first[long, place] = bisect_runs(ordinal, first[long, place], stop[long, place], known - HISTORY_LIMIT)
        return first, stop

    def _runs(self, user_id: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return begin and end of each user's entries of all times, each ``[n, domains]``; empty for unknown users."""
        runs = np.zeros((len(user_id), len(DOMAINS) + 1), np.int64)
        if len(self._user_id):
            place = np.minimum(_search(self._user_id, user_id), len(self._user_id) - 1)
            known = self._user_id[place] == user_id
            runs[known] = self._offsets[place[known]]
        return runs[:, :-1], runs[:, 1:]

    def _known_until(self, begin: np.ndarray, end: np.ndarray, domain: int, as_of_ms: np.ndarray) -> np.ndarray:
        """Return the end of the entries of one domain that were known before a time, ``[n]``."""
        return bisect_runs(self._entries["known_ms"], begin[:, domain], end[:, domain], as_of_ms)

    def _matching(self, require: int) -> np.ndarray:
        """Return the positions of all entries that have one of the bits ``require``; computed once for each value."""
        if require not in self._matches:
            self._matches[require] = np.flatnonzero(self._entries["bits"] & require)
        return self._matches[require]

    def verify(self, files: DatasetFiles, names: Iterable[str], advance: Callable[[int], None] = _ignore) -> None:
        """Read some columns whole, and compare them with their checksums.

        Args:
            files: of the dataset.
            names: of :attr:`file_names`.
            advance: called with the number of bytes of each block that was read.

        Raises:
            UserError: a file is damaged.
        """
        for name in names:
            copy = self._folder / name if storage.is_remote(files.path) else None
            files.verify(f"{FOLDER}/{name}", copy, advance)

    def file_of(self, name: str) -> Path:
        """Return the file of a column."""
        return self._folder / f"{name}.npy"

    @property
    def file_names(self) -> list[str]:
        """Names of the files of the histories, the largest first."""
        return sorted(
            (file.name for file in self._folder.glob("*.npy") if file.stem in (*ENTRY_COLUMNS, *USER_COLUMNS)),
            key=lambda name: (-(self._folder / name).stat().st_size, name),
        )

    def _open(self, folder: Path) -> None:
        """Map the columns of a history directory."""
        self._folder = folder
        self._matches: dict[int, np.ndarray] = {}
        # Plain arrays over the mapped memory: every index into np.memmap makes a new instance of the subclass.
        columns = {
            name: np.asarray(_map_column(folder, name))
            for name in (*ENTRY_COLUMNS, *USER_COLUMNS)
            if name not in _LATER_COLUMNS or os.path.lexists(folder / f"{name}.npy")
        }
        self._user_id, self._offsets = (columns.pop(name) for name in USER_COLUMNS)
        # A broadcast zero stands for a missing column without memory of its own.
        for name in _LATER_COLUMNS - columns.keys():
            columns[name] = np.broadcast_to(np.zeros(1, ENTRY_COLUMNS[name]), columns["item_id"].shape)
        self._entries = columns

    def _check(self, partitions: int) -> None:
        """Check that the columns fit together.

        Raises:
            UserError: a column has another length, the runs do not cover the entries, or times fall in a run; names
                the file.
        """
        entries, users = len(self._entries["known_ms"]), len(self._user_id)
        for name, column in self._entries.items():
            if len(column) != entries:
                self._refuse(name, f"has {len(column):,} entries, known_ms.npy has {entries:,}")
        if self._offsets.shape != (users, len(DOMAINS) + 1):
            self._refuse(
                "offsets", f"has shape {self._offsets.shape}; {users:,} users need {(users, len(DOMAINS) + 1)}"
            )
        unsorted = np.flatnonzero(self._user_id[1:] <= self._user_id[:-1])
        if len(unsorted):
            self._refuse("user_id", f"is not in increasing order at user {unsorted[0] + 1}")
        starts = self._check_runs(entries, partitions)
        self._check_times(starts)

    def _check_runs(self, entries: int, partitions: int) -> np.ndarray:
        """Check that the runs of all users follow each other in the order of the partitions.

        Returns:
            The entries where runs begin, in order.
        """
        offsets = self._offsets
        bad = (offsets < 0) | (offsets > entries)
        bad[:, 1:] |= offsets[:, 1:] < offsets[:, :-1]
        if bad.any():
            user = int(np.argmax(bad.any(axis=1)))
            runs = ", ".join(map(str, offsets[user].tolist()))
            self._refuse("offsets", f"user {self._user_id[user]} has runs at {runs} of {entries:,} entries")
        stored = self.stored_runs(partitions)
        edges = np.concatenate([[0], stored[:, -1]])
        gaps = np.flatnonzero(np.append(stored[:, 0], entries) != edges)
        if len(gaps):
            self._refuse("offsets", f"the runs of the users leave gaps or overlap at entry {edges[gaps[0]]:,}")
        return stored[:, :-1].reshape(-1)

    def _check_times(self, starts: np.ndarray) -> None:
        """Check that the times of each run rise; ``starts`` says where runs begin."""
        known_ms = self._entries["known_ms"]
        for first in range(0, len(known_ms), _CHECKED_ENTRIES):
            piece = known_ms[first : first + _CHECKED_ENTRIES + 1]
            falls = np.flatnonzero(piece[1:] < piece[:-1]) + first + 1
            place = np.minimum(np.searchsorted(starts, falls), len(starts) - 1)
            inside = starts[place] != falls
            if inside.any():
                entry = int(falls[np.argmax(inside)])
                self._refuse("known_ms", f"entry {entry:,} is earlier than the one before it in the same history")

    def _refuse(self, column: str, problem: str) -> NoReturn:
        raise UserError(f"{self.file_of(column)}: damaged, {problem}; restore the dataset, or make it again")


class HistoryWriter:
    """Writes ``history/*.npy``, one partition after the other.

    Args:
        folder: the ``history`` directory, which must exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = {name: _GrowingColumn(folder / f"{name}.npy", dtype) for name, dtype in ENTRY_COLUMNS.items()}
        self._users: list[np.ndarray] = []
        self._offsets: list[np.ndarray] = []
        self._entries = 0

    def append(self, visits: dict[str, np.ndarray]) -> None:
        """Add the visits of a partition, in any order.

        Args:
            visits: ``user_id``, ``domain`` and the columns of an entry except ``ordinal``; without ``tag`` all tags are
                0 (unknown).
        """
        # Users are numbered within the partition. Runs are sorted by user, then domain; each run by time.
        visits = {"tag": np.zeros(len(visits["user_id"]), np.int32), **visits}
        user_id, number = np.unique(visits["user_id"], return_inverse=True)
        run = number * len(DOMAINS) + visits["domain"]
        by_time = stable_order(visits["known_ms"])
        by_user = by_time[stable_order(number[by_time])]
        counts = np.bincount(number, minlength=len(user_id))
        ordinal = np.empty(len(run), np.int64)
        ordinal[by_user] = np.arange(len(run)) - np.repeat(np.cumsum(counts) - counts, counts)
        order = by_time[stable_order(run[by_time])]
        for name, file in self._files.items():
            file.append((ordinal if name == "ordinal" else visits[name])[order])
        per_run = np.bincount(run, minlength=len(user_id) * len(DOMAINS)).reshape(-1, len(DOMAINS))
        offsets = np.zeros((len(user_id), len(DOMAINS) + 1), np.int64)
        ends = self._entries + np.cumsum(per_run.reshape(-1)).reshape(per_run.shape)
        offsets[:, 1:] = ends
        offsets[:, 0] = ends[:, 0] - per_run[:, 0]
        self._users.append(user_id)
        self._offsets.append(offsets)
        self._entries += len(run)

    def close(self) -> None:
        """Complete the files, and write the users and their offsets."""
        for file in self._files.values():
            file.close()
        user_id = np.concatenate([np.empty(0, np.int64), *self._users])
        offsets = np.concatenate([np.empty((0, len(DOMAINS) + 1), np.int64), *self._offsets])
        # Entries stay in the order of the partitions; only the table of users is sorted, for binary search.
        order = stable_order(user_id)
        np.save(self._folder / "user_id.npy", user_id[order])
        np.save(self._folder / "offsets.npy", offsets[order])


class _GrowingColumn:
    """Writes a one-dimensional .npy file whose length is known only at the end."""

    def __init__(self, file: Path, dtype: np.dtype) -> None:
        self._dtype = dtype
        self._rows = 0
        self._file: BinaryIO = open(file, "wb")  # noqa: SIM115 (closed by close)
        self._write_header()

    def append(self, values: np.ndarray) -> None:
        """Write more values."""
        self._file.write(np.ascontiguousarray(values, self._dtype).data)
        self._rows += len(values)

    def close(self) -> None:
        """Write the final length into the header, and close the file."""
        # numpy pads the header so that the length can grow; the new header has the same size.
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def _write_header(self) -> None:
        """Write the header for the rows so far at the current position."""
        description = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._rows,)}
        np.lib.format.write_array_header_1_0(self._file, description)


def _map_column(folder: Path, name: str) -> np.ndarray:
    """Map a column.

    Raises:
        UserError: the file is missing, lies elsewhere, or is not an array of the column's type.
    """
    dtype, ndim = ENTRY_COLUMNS.get(name, np.dtype(np.int64)), 2 if name == "offsets" else 1
    try:
        return load_array(file_inside(folder, f"{name}.npy"), ndim, dtype)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder / name}.npy is missing; restore the dataset, or make it again") from None


def bisect_runs(
    column: np.ndarray, first: np.ndarray, stop: np.ndarray, value: np.ndarray, *, after: bool = False
) -> np.ndarray:
    """Return the first position in each run ``[first, stop)`` whose value is not below ``value``, ``[n]`` int64.

    The column is sorted within each run; all n binary searches advance together. With ``after``, the position is the
    first one whose value is above ``value``.
    """
    low, high = first.copy(), stop.copy()
    for _ in range(int((stop - first).max(initial=0)).bit_length()):
        middle = (low + high) >> 1
        # In a finished search low == high, and the value read may lie outside the run or behind the column's end.
        there = np.take(column, middle, mode="clip")
        below = (there <= value if after else there < value) & (low < high)
        low = np.where(below, middle + 1, low)
        high = np.where(below, high, middle)
    return low


def _search(column: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return ``np.searchsorted(column, values)``, ``[n] int64``, with the values looked up in sorted order.

    Sorted lookups are twice as fast in a long column.
    """
    order = np.argsort(values)
    places = np.empty(len(values), np.int64)
    places[order] = np.searchsorted(column, values[order])
    return places


def _reopen(folder: Path) -> Histories:
    """Open a history directory; pickle calls this."""
    histories = Histories.__new__(Histories)
    histories._open(folder)
    return histories


def _cached(files: DatasetFiles, spec: DatasetSpec) -> Path:
    """Return the local copy of a remote dataset's histories; copy and verify them first if there is none."""
    url = files.path
    cache = os.environ.get("LIMELIGHT_CACHE", Path.home() / ".cache" / "limelight")
    root = local_path(cache, "LIMELIGHT_CACHE", "name a local directory")
    # The description has the seed, spans and counts of the dataset, so a new version gets a new directory.
    copy = root / hashlib.sha256(f"{url}\n{spec.to_json()}".encode()).hexdigest()[:32] / FOLDER
    if copy.exists():
        return copy
    copy.parent.mkdir(parents=True, exist_ok=True)
    # Copied under another name first: several processes of a machine may do this at the same time.
    tmp_path = Path(tempfile.mkdtemp(dir=copy.parent))
    try:
        filesystem, inside = storage.open_url(storage.join(url, FOLDER))
        try:
            for name in (*ENTRY_COLUMNS, *USER_COLUMNS):
                if name not in _LATER_COLUMNS or filesystem.exists(f"{inside}/{name}.npy"):
                    filesystem.get_file(f"{inside}/{name}.npy", str(tmp_path / f"{name}.npy"))
                    files.verify(f"{FOLDER}/{name}.npy", tmp_path / f"{name}.npy")
        except FileNotFoundError as error:
            raise UserError(f"{url}: the dataset has no histories ({error})") from None
        # Other users of the machine may share the cache.
        set_usual_modes(tmp_path)
        try:
            tmp_path.rename(copy)
        except OSError:
            # Another process made the same copy first.
            if not copy.exists():
                raise
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)
    return copy
