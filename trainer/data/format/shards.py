"""Training rows on disk: WebDataset tars of column batches, with an index beside them.

``rows/part-00003-000000.tar`` holds records of one partition in emission order. Each record is a member
``<partition>-<record>.safetensors`` (record.py) that any WebDataset reader can read. ``rows/part-00003.index.json``
lists the records of the partition::

    {"shard": "part-00003-000000.tar", "offset": 512, "size": 483000, "rows": 1024,
     "request_ms": [first, last], "emit_ms": [first, last], "crc32": 907060870}

``offset`` and ``size`` give the bytes of the member in the tar, so that one range read fetches one record.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np

from trainer.console.errors import UserError, one_line
from trainer.data.format import record as records
from trainer.data.format import storage
from trainer.data.format.dataset_files import DatasetFiles
from trainer.data.format.schema import DatasetSpec, Rows, partition_of, row_columns
from trainer.data.format.sorting import time_order
from trainer.runtime.files import write_fully
from trainer.runtime.stored_files import MAX_JSON_BYTES

FOLDER = "rows"
HOUR_MS = 3_600_000

_SHARD = re.compile(r"part-[0-9]+-[0-9]+\.tar")
_TAR_BLOCK = 512
_MAX_HEADERS = 4 * _TAR_BLOCK
"""Largest distance between the bytes of two records: padding of one block, and headers of the next member."""
_MAX_TAIL = 23 * _TAR_BLOCK
"""Largest number of bytes behind the last record: padding, and the end of the tar, which fills 20 blocks."""


@dataclass(frozen=True)
class RecordIndex:
    """Rows and times of the records of a partition, arrays of ``[records] int64``.

    Attributes:
        rows: number of rows.
        request_min: earliest request, milliseconds UTC, as all times here.
        request_max: latest request.
        emit_min: earliest emission.
        emit_max: latest emission.
    """

    rows: np.ndarray
    request_min: np.ndarray
    request_max: np.ndarray
    emit_min: np.ndarray
    emit_max: np.ndarray


class RowStore:
    """Reads the training rows of a dataset, one record at a time.

    A store holds no open file, so it can be pickled, forked and used by several processes.

    Args:
        path: dataset, a local path or an fsspec URL.
        spec: description of the dataset.
        on_corrupt: treatment of a record that is damaged, cut short or missing: ``error`` raises an error, ``skip``
            leaves the record out and adds its rows to ``skipped_rows``.

    Attributes:
        path: dataset.
        partitions: number of partitions.
        on_corrupt: as given.
        skipped_rows: rows of the corrupt records that were left out so far.
    """

    def __init__(self, path: str | Path, spec: DatasetSpec, on_corrupt: Literal["error", "skip"] = "error") -> None:
        self.path = str(path)
        self.partitions = spec.partitions
        self.on_corrupt = on_corrupt
        self.skipped_rows = 0
        self._columns = row_columns(spec)
        self._files = DatasetFiles(path)
        self._index: dict[int, _Index] = {}
        self._places: dict[str, str] = {}

    def check(self, spec: DatasetSpec) -> None:
        """Check the index of every partition: in itself, against the sizes of the shards, and its rows in all.

        Args:
            spec: description of the dataset.

        Raises:
            UserError: an index is damaged, names other shards than there are, has times that do not rise or lie outside
                the dataset's, or the rows of all do not add up; names the file. With ``on_corrupt="skip"`` shards may
                be missing or cut short.
        """
        sizes = self._files.sizes(FOLDER)
        shards = _shards_by_partition(sizes or {})
        rows = 0
        for partition in range(self.partitions):
            index = self._open(partition)
            problem = index.problem(partition, spec)
            if problem is None and sizes is not None:
                problem = index.missing_part(shards.get(partition, []), sizes, self.on_corrupt == "skip")
            if problem is not None:
                file = storage.join(self.path, f"{FOLDER}/{index_name(partition)}")
                raise UserError(f"{file}: damaged, {problem}; restore the dataset, or make it again")
            rows += int(index.records.rows.sum())
        if rows != spec.rows:
            raise UserError(
                f"{storage.join(self.path, FOLDER)}/*.index.json: damaged, they list {rows:,} rows in all, and "
                f"dataset.json {spec.rows:,}; restore the dataset, or make it again"
            )

    def records(self, partition: int) -> RecordIndex:
        """Return rows and times of the records of a partition, in emission order.

        Raises:
            UserError: the index is missing or damaged.
        """
        return self._open(partition).records

    def read(self, partition: int, record: int, columns: Sequence[str] | None = None) -> Rows | None:
        """Read the rows of one record, as read-only views of the bytes.

        Args:
            partition: number of the partition, in ``[0, partitions)``.
            record: position in ``records(partition)``.
            columns: columns to read, all by default.

        Returns:
            The rows, or ``None`` if the record is corrupt and ``on_corrupt`` is ``skip``.

        Raises:
            UserError: the record is damaged, cut short or missing, and ``on_corrupt`` is ``error``; the message gives
                the shard.
        """
        index = self._open(partition)
        file = self.shard_of(partition, record)
        offset, size, rows = int(index.offset[record]), int(index.size[record]), int(index.records.rows[record])
        try:
            data = storage.read_bytes(self._locate(index.shard[record]), offset, size)
        except FileNotFoundError:
            wrong = "the shard is missing"
        except OSError as error:
            wrong = error.strerror or str(error)
        else:
            # The checksum is in the index and not in the shard, so it also finds a shard that was replaced.
            if len(data) == size and zlib.crc32(data) == index.crc32[record]:
                try:
                    return self._decode(data, columns, index.records, record)
                except ValueError as error:
                    wrong = one_line(error).partition(": ")[2]
            else:
                wrong = "the shard is cut short" if len(data) < size else "its checksum does not match"
        if self.on_corrupt == "error":
            raise UserError(
                f"{file}: record {record} at byte {offset} ({rows} rows) cannot be read: {wrong}; restore the file, or "
                f'leave such records out with data.on_corrupt = "skip"'
            )
        self.skipped_rows += rows
        return None

    def shard_of(self, partition: int, record: int) -> str:
        """Return the path or URL of the shard that holds a record."""
        return storage.join(self.path, f"{FOLDER}/{self._open(partition).shard[record]}")

    def _decode(self, data: bytes, columns: Sequence[str] | None, index: RecordIndex, record: int) -> Rows:
        """Return columns of a record, which must be as the index and the description of the dataset say.

        Raises:
            ValueError: they are not.
        """
        wanted = list(self._columns if columns is None else columns)
        rows = records.decode(data, list(dict.fromkeys([*wanted, "request_ms", "emit_ms"])))
        n = int(index.rows[record])
        for name, column in rows.items():
            dtype, shape = self._columns[name]
            if column.dtype != dtype or column.shape != (n, *shape):
                raise ValueError(f"column {name!r} is {column.dtype} {column.shape}, not {dtype} {(n, *shape)}")
        for name, low, high in (
            ("request_ms", index.request_min, index.request_max),
            ("emit_ms", index.emit_min, index.emit_max),
        ):
            if (rows[name].min(), rows[name].max()) != (low[record], high[record]):
                raise ValueError(f"its {name} are not those of the index")
        return {name: rows[name] for name in wanted}

    def _locate(self, shard: str) -> str:
        """Return the path of a shard; links are resolved once for each shard."""
        if shard not in self._places:
            self._places[shard] = self._files.locate(f"{FOLDER}/{shard}")
        return self._places[shard]

    def _open(self, partition: int) -> _Index:
        """Return the index of a partition, which is read once."""
        if partition not in self._index:
            file = storage.join(self.path, f"{FOLDER}/{index_name(partition)}")
            try:
                self._index[partition] = _Index.parse(
                    self._files.read(f"{FOLDER}/{index_name(partition)}", MAX_JSON_BYTES)
                )
            except FileNotFoundError:
                raise UserError(f"{file}: the index of partition {partition} is missing") from None
            except OSError as error:
                wrong = error.strerror or str(error)
                raise UserError(f"{file}: the index of partition {partition} cannot be read ({wrong})") from None
            except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError, MemoryError) as error:
                raise UserError(f"{file}: not a valid shard index ({error!r:.200})") from None
        return self._index[partition]


@dataclass(frozen=True)
class _Index:
    """Index of a partition: ``records``, and for each record its shard, place and checksum."""

    records: RecordIndex
    shard: list[str]
    offset: np.ndarray
    size: np.ndarray
    crc32: np.ndarray

    @staticmethod
    def parse(text: bytes) -> _Index:
        """Read the JSON of an index file."""
        entries = json.loads(text)
        if not isinstance(entries, list):
            raise ValueError("a list is expected")
        # Records name few shards, so they share one string each.
        names: dict[str, str] = {}

        def column(values: Iterable[int]) -> np.ndarray:
            whole = list(values)
            if not all(type(value) is int for value in whole):
                raise ValueError("a value is not a whole number")
            return np.array(whole, np.int64)

        ends = ((name, end) for name in ("request_ms", "emit_ms") for end in (0, 1))
        return _Index(
            RecordIndex(
                column(entry["rows"] for entry in entries),
                *(column(entry[name][end] for entry in entries) for name, end in ends),
            ),
            [names.setdefault(name, name) for name in (_shard_name(entry["shard"]) for entry in entries)],
            *(column(entry[name] for entry in entries) for name in ("offset", "size", "crc32")),
        )

    def problem(self, partition: int, spec: DatasetSpec) -> str | None:
        """Return what is wrong with the index in itself, or None.

        Args:
            partition: number of the partition.
            spec: description of the dataset.
        """
        index = self.records
        first_ms, last_ms = spec.span_ms
        for name in sorted(set(self.shard)):
            if _partition_of_shard(name) != partition:
                return f"it lists {name}, which belongs to partition {_partition_of_shard(name)}"
        early = np.zeros(len(index.rows), bool)
        early[1:] = index.emit_min[1:] < index.emit_max[:-1]
        bad = {
            "has no rows or no bytes": (index.rows < 1) | (self.size < 1) | (self.offset < 0),
            "ends before it begins": (index.request_min > index.request_max) | (index.emit_min > index.emit_max),
            "is emitted before it is requested": (index.request_min > index.emit_min)
            | (index.request_max > index.emit_max),
            "was requested outside the times of dataset.json": (index.request_min < first_ms)
            | (index.request_max > last_ms),
            "is emitted before the record before it": early,
        }
        for what, where in bad.items():
            if where.any():
                return f"record {int(np.argmax(where))} {what}"
        return None

    def missing_part(self, shards: Iterable[str], sizes: Mapping[str, int], skip: bool) -> str | None:
        """Return how the index and the shards of its partition differ, or None.

        Args:
            shards: names of the shards that are there.
            sizes: bytes of each file in the folder.
            skip: shards may be missing or cut short.
        """
        if extra := sorted(set(shards) - set(self.shard)):
            return f"it does not list {extra[0]}, which is there"
        stop = self.offset + self.size
        first = np.array([k == 0 or self.shard[k] != self.shard[k - 1] for k in range(len(self.shard))], bool)
        # Bytes between a record and the end of the one before it, or the beginning of the shard.
        gap = self.offset - np.where(first, 0, np.append(0, stop[:-1])[: len(stop)])
        if ((gap < 0) | (gap > _MAX_HEADERS)).any() or first.sum() != len(set(self.shard)):
            return "the places of its records overlap or leave gaps"
        for record in np.flatnonzero(np.append(first[1:], True)[: len(first)]).tolist():
            name, end = self.shard[record], int(stop[record])
            size = sizes.get(name)
            if skip and (size is None or size < end):
                continue
            if size is None:
                return f"it lists {name}, which is missing"
            if not 0 <= size - end <= _MAX_TAIL:
                return f"it lists {end:,} bytes of {name}, which has {size:,}"
        return None


def _shards_by_partition(names: Iterable[str]) -> dict[int, list[str]]:
    """Return partition -> names of its shards, of names of files."""
    shards: dict[int, list[str]] = {}
    for name in names:
        if _SHARD.fullmatch(name):
            shards.setdefault(_partition_of_shard(name), []).append(name)
    return shards


def _partition_of_shard(name: str) -> int:
    return int(name.split("-")[1])


def _shard_name(name: object) -> str:
    """Return the name of a shard, which is a file beside its index."""
    if not isinstance(name, str) or not _SHARD.fullmatch(name):
        raise ValueError(f"shard {name!a:.60} is not a name such as part-00000-000000.tar")
    return name


class ShardWriter:
    """Writes the training rows of one partition, given in emission order.

    A record ends after ``rows_per_record`` rows. Once it has a quarter of them, it also ends where the hour (UTC) of
    emission changes, so that a window of hours consists of whole records, or nearly so.

    Args:
        folder: the ``rows`` directory, which must exist.
        partition: number of the partition.
        rows_per_record: largest number of rows of a record.
        records_per_shard: largest number of records of a tar.
    """

    def __init__(
        self, folder: Path, partition: int, *, rows_per_record: int = 1024, records_per_shard: int = 256
    ) -> None:
        self._folder = folder
        self._partition = partition
        self._rows_per_record = rows_per_record
        self._records_per_shard = records_per_shard
        self._waiting: list[Rows] = []
        self._entries: list[dict] = []
        self._shard: _Shard | None = None

    def append(self, rows: Rows) -> None:
        """Add rows; none may be emitted before a row that was added earlier. The arrays are kept until written."""
        if len(rows["emit_ms"]):
            self._waiting.append(rows)
            if sum(len(waiting["emit_ms"]) for waiting in self._waiting) >= self._rows_per_record:
                self._write(last=False)

    def close(self) -> None:
        """Write the remaining rows and the index."""
        if self._waiting:
            self._write(last=True)
        if self._shard is not None:
            self._shard.close()
        (self._folder / index_name(self._partition)).write_text(json.dumps(self._entries))

    def _write(self, last: bool) -> None:
        """Write the complete records of the waiting rows; with ``last`` also the incomplete one at the end."""
        rows = {name: np.concatenate([part[name] for part in self._waiting]) for name in self._waiting[0]}
        emit = rows["emit_ms"]
        hour = emit // HOUR_MS
        turns = np.flatnonzero(hour[1:] != hour[:-1]) + 1
        start = 0
        while start < len(emit):
            stop = start + self._rows_per_record
            # A change of the hour in the first quarter is ignored: records would become very small.
            turn = np.searchsorted(turns, start + max(self._rows_per_record // 4, 1))
            if turn < len(turns):
                stop = min(stop, int(turns[turn]))
            if stop > len(emit):
                # An incomplete record waits for more rows.
                if not last:
                    break
                stop = len(emit)
            self._write_record({name: column[start:stop] for name, column in rows.items()})
            start = stop
        self._waiting = [{name: column[start:] for name, column in rows.items()}] if start < len(emit) else []

    def _write_record(self, rows: Rows) -> None:
        """Write one record, in a new shard if the current one is full, and note it in the index."""
        number = len(self._entries)
        if number % self._records_per_shard == 0:
            if self._shard is not None:
                self._shard.close()
            name = f"part-{self._partition:05d}-{number // self._records_per_shard:06d}.tar"
            self._shard = _Shard(self._folder / name)
        data = records.encode(rows)
        assert self._shard is not None
        offset = self._shard.add(f"{self._partition:05d}-{number:08d}", data)
        request, emit = rows["request_ms"], rows["emit_ms"]
        self._entries.append(
            {
                "shard": self._shard.name,
                "offset": offset,
                "size": len(data),
                "rows": len(emit),
                "request_ms": [int(request.min()), int(request.max())],
                "emit_ms": [int(emit[0]), int(emit[-1])],
                "crc32": zlib.crc32(data),
            }
        )


class _Shard:
    """A tar in writing. The file is open only during a write: there can be more partitions than open files."""

    def __init__(self, file: Path) -> None:
        import webdataset

        self.name = file.name
        self._file = file
        self._blocks: list[bytes] = []
        sink = SimpleNamespace(write=self._blocks.append)
        # Times and owners are fixed, so that the same rows give the same bytes.
        self._tar = webdataset.TarWriter(sink, user="", group="", encoder=False, compress=False, mtime=0)

    def add(self, key: str, data: bytes) -> int:
        """Append one member, and return the position of its first byte in the file."""
        self._tar.write({"__key__": key, records.SUFFIX: data})
        self._flush()
        return self._tar.tarstream.offset + len(data) // -_TAR_BLOCK * _TAR_BLOCK

    def close(self) -> None:
        """Write the end of the tar."""
        self._tar.close()
        self._flush()

    def _flush(self) -> None:
        """Append the bytes that the tar writer produced to the file."""
        with open(self._file, "ab", buffering=0) as file:
            write_fully(file, b"".join(self._blocks))
        self._blocks.clear()


def read_rows(
    path: str | Path,
    spec: DatasetSpec,
    *,
    columns: Sequence[str] | None = None,
    request_from: int | None = None,
    request_until: int | None = None,
    emit_until: int | None = None,
) -> Rows:
    """Read all rows of a dataset in a time range: partition after partition, in emission order within each.

    Args:
        path: dataset, a local path or an fsspec URL.
        spec: description of the dataset.
        columns: columns to read, all by default.
        request_from: read rows requested at this time or later, milliseconds UTC.
        request_until: read rows requested before this time.
        emit_until: read rows emitted before this time.

    Returns:
        The columns, and in addition ``partition`` (int64).
    """
    store = RowStore(path, spec)
    layout = row_columns(spec)
    wanted = list(layout if columns is None else columns)
    parts: dict[str, list[np.ndarray]] = {name: [np.empty((0, *layout[name][1]), layout[name][0])] for name in wanted}
    partition_rows = np.zeros(spec.partitions, np.int64)
    for partition in range(spec.partitions):
        index = store.records(partition)
        inside = np.ones(len(index.rows), bool)
        if request_from is not None:
            inside &= index.request_max >= request_from
        if request_until is not None:
            inside &= index.request_min < request_until
        if emit_until is not None:
            inside &= index.emit_min < emit_until
        for record in np.flatnonzero(inside):
            # Records are selected as a whole; rows outside the range are left out below.
            rows = store.read(partition, int(record), list(dict.fromkeys([*wanted, "request_ms", "emit_ms"])))
            assert rows is not None
            kept = np.ones(len(rows["request_ms"]), bool)
            if request_from is not None:
                kept &= rows["request_ms"] >= request_from
            if request_until is not None:
                kept &= rows["request_ms"] < request_until
            if emit_until is not None:
                kept &= rows["emit_ms"] < emit_until
            for name in wanted:
                parts[name].append(rows[name][kept])
            partition_rows[partition] += kept.sum()
    result = {name: np.concatenate(part) for name, part in parts.items()}
    result["partition"] = np.repeat(np.arange(spec.partitions), partition_rows)
    return result


def write_rows(
    path: str | Path, spec: DatasetSpec, rows: Rows, *, rows_per_record: int = 1024, records_per_shard: int = 256
) -> None:
    """Write rows, given in any order, as the shards of the local dataset directory ``path``.

    Raises:
        FileExistsError: the directory has rows already.
    """
    folder = Path(path) / FOLDER
    folder.mkdir(parents=True)
    owner = partition_of(rows["user_id"], spec.partitions)
    names = row_columns(spec)
    for partition in range(spec.partitions):
        place = np.flatnonzero(owner == partition)
        place = place[time_order(rows["emit_ms"][place], rows["request_ms"][place])]
        writer = ShardWriter(folder, partition, rows_per_record=rows_per_record, records_per_shard=records_per_shard)
        writer.append({name: rows[name][place] for name in names})
        writer.close()


def index_name(partition: int) -> str:
    """Return the file name of a partition's index."""
    return f"part-{partition:05d}.index.json"
