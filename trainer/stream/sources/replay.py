"""Replays the events of a stored dataset in event time order, as fast as possible or at a chosen speed.

A replay brings what a live stream would bring, from files and without a broker, with the features of the stored
training rows. Positions count rows of each partition's ``events/part-*.parquet``. At a speed, batches end at fixed
event times, so they are the same under any load and after any restart; the clock only decides when they come.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.config.stream import StreamConfig
from trainer.console.errors import UserError
from trainer.data.format import storage
from trainer.data.format.dataset import fingerprint
from trainer.data.format.dataset_files import DatasetFiles
from trainer.data.format.parquet_files import open_parquet
from trainer.data.format.schema import EVENT_COLUMNS, DatasetSpec
from trainer.data.format.validation import Columns
from trainer.data.format.visit_events import event_codes
from trainer.stream.labels.assembled_rows import EVENT_TYPES
from trainer.stream.sources.replay_features import ReplayFeatures
from trainer.stream.sources.source import EventBatch, Position, SourceIdentity, StreamReader, starting_position
from trainer.stream.sources.time_merge import TimeMerge

_MAX_ROWS = 1 << 16


class ReplaySource:
    """Source that replays the events of a dataset.

    Args:
        path: dataset, a directory or an fsspec URL.
        config: config of the stream.
        since_ms: time of the first event of a new replay; a saved position may be anywhere.
        until_ms: the replay ends before the first event at this time or later.

    Attributes:
        spec: description of the dataset.

    Raises:
        UserError: there is no dataset at ``path``.
    """

    def __init__(
        self, path: str | Path, config: StreamConfig, since_ms: int | None = None, until_ms: int | None = None
    ) -> None:
        self.spec = DatasetSpec.load(path)
        self._path, self._config, self._since_ms, self._until_ms = path, config, since_ms, until_ms

    @property
    def partitions(self) -> int:
        """Number of partitions of the dataset."""
        return self.spec.partitions

    @property
    def identity(self) -> SourceIdentity:
        """Digest of the dataset's description and of its files' metadata, independent of its path."""
        digest = hashlib.blake2b(self.spec.to_json().encode(), digest_size=16)
        if self.spec.rows:
            # The features of the rows are part of the stream.
            digest.update(fingerprint(str(self._path), self.spec).encode())
        for partition in range(self.partitions):
            digest.update(PartitionLog(self._path, self.spec, partition).digest)
        return {"source": "files", "events": digest.hexdigest()}

    def open(
        self, partitions: Sequence[int], position: Mapping[int, Sequence[int]] | None = None, slice_ms: int = 0
    ) -> StreamReader:
        """Open a reader of some partitions; see :class:`trainer.stream.sources.source.Source`."""
        logs = {partition: PartitionLog(self._path, self.spec, partition) for partition in sorted(partitions)}
        for log in logs.values():
            log.verify()

        def beginning(partition: int) -> Sequence[int]:
            return (0, 0, 0, 0) if self._since_ms is None else (logs[partition].rows_before(self._since_ms), 0, 0, 0)

        start = starting_position(partitions, position, self.partitions, beginning)
        for partition, (place, *_) in start.items():
            if place > logs[partition].rows:
                raise UserError(
                    f"the saved stream position of partition {partition} is event {place:,}, {self._path} has "
                    f"{logs[partition].rows:,}: replay the dataset that the run started with"
                )
        # The clock starts at the latest time in the position of all ranks, so that all ranks replay in step.
        anchors = start if position is None else position
        anchor_ms = max((int(at[2]) for at in anchors.values()), default=0) or self._since_ms or self.spec.span_ms[0]
        features = {partition: ReplayFeatures(self._path, self.spec, partition) for partition in logs}
        feed = _ReplayFeed(logs, features, start, self._config, anchor_ms, self._until_ms, slice_ms)
        return StreamReader(feed, self._config.queue_batches)


class PartitionLog:
    """Event log of one partition of a dataset.

    Args:
        path: dataset, a directory or an fsspec URL.
        spec: description of the dataset.
        partition: number of the partition.

    Attributes:
        rows: number of events.
        last_ms: time of the last event, 0 if the file has no statistics.
        digest: metadata of the file's columns: sizes, offsets and ranges.

    Raises:
        UserError: the file cannot be read.
    """

    def __init__(self, path: str | Path, spec: DatasetSpec, partition: int) -> None:
        self._spec, self._files, self._file = spec, DatasetFiles(path), f"events/part-{partition:05d}.parquet"
        self._name = storage.join(path, self._file)
        try:
            with self._open() as file:
                metadata = file.metadata
        except FileNotFoundError:
            raise UserError(f"{self._name}: no such file; the dataset has no event log of this partition") from None
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from None
        groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        self.digest = repr([group.to_dict() for group in groups]).encode()
        self._starts = np.cumsum([0, *(group.num_rows for group in groups)])
        self.rows = int(self._starts[-1])
        last = [group.column(EVENT_COLUMNS.get_field_index("time_ms")).statistics for group in groups[-1:]]
        self.last_ms = int(last[0].max) if last and last[0] is not None and last[0].has_min_max else 0

    def verify(self) -> None:
        """Read the whole file, and compare it with its checksum.

        Raises:
            UserError: it is damaged.
        """
        self._files.verify(self._file)

    def chunks(self, place: int, max_rows: int = _MAX_ROWS) -> Iterator[Columns]:
        """Yield the events from a row on, in portions: columns of ``EVENT_TYPES`` and ``place``.

        Args:
            place: first row.
            max_rows: maximum number of rows of a portion.

        Raises:
            UserError: the file cannot be read.
        """
        if place >= self.rows:
            return
        # Row groups before ``place`` are skipped without reading.
        first = int(np.searchsorted(self._starts, place, "right")) - 1
        at = int(self._starts[first])
        try:
            with self._open() as file:
                groups = list(range(first, file.num_row_groups))
                for batch in file.iter_batches(max_rows, groups, list(EVENT_TYPES), use_threads=False):
                    skipped = min(max(place - at, 0), batch.num_rows)
                    at += batch.num_rows
                    if skipped < batch.num_rows:
                        yield self._columns(batch.slice(skipped), at)
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from None

    def rows_before(self, time_ms: int) -> int:
        """Return the number of events before ``time_ms``."""
        rows = 0
        for columns in self.chunks(0):
            inside = int(np.searchsorted(columns["time_ms"], time_ms))
            rows += inside
            if inside < len(columns["time_ms"]):
                break
        return rows

    def _columns(self, batch: pa.RecordBatch, stop: int) -> Columns:
        """Return the columns of a batch that ends before row ``stop``.

        Raises:
            UserError: a column has another type or nulls, or an event is unknown.
        """
        columns: Columns = {}
        for name, dtype in EVENT_TYPES.items():
            column = batch.column(batch.schema.get_field_index(name))
            if name == "event":
                columns[name] = event_codes(self._spec, pa.chunked_array([column]))
                if (columns[name] < 0).any():
                    row = int(np.argmax(columns[name] < 0))
                    raise UserError(
                        f"{self._name}: column 'event' is {column[row].as_py()!r}, which is not an event of the dataset"
                    )
            elif column.type != EVENT_COLUMNS.field(name).type or column.null_count:
                expected = EVENT_COLUMNS.field(name).type
                raise UserError(f"{self._name}: column {name!r} is {column.type}; it must be {expected} without nulls")
            else:
                columns[name] = column.to_numpy().astype(dtype, copy=False)
        columns["place"] = np.arange(stop - batch.num_rows + 1, stop + 1)
        return columns

    def _open(self) -> pq.ParquetFile:
        return open_parquet(self._files, self._file)

    def _unreadable(self, error: Exception) -> UserError:
        return UserError(f"{self._name}: not a readable Parquet file ({str(error).splitlines()[0]})")


class _ReplayFeed:
    """Feed of some partitions of a dataset, merged by event time."""

    def __init__(
        self,
        logs: Mapping[int, PartitionLog],
        features: Mapping[int, ReplayFeatures],
        position: Position,
        config: StreamConfig,
        anchor_ms: int,
        until_ms: int | None,
        slice_ms: int,
    ) -> None:
        self._logs, self._features, self._slice_ms = logs, features, slice_ms
        self.position, self._config, self._until_ms = position, config, until_ms
        self._anchor_ms, self._began = anchor_ms, time.time()
        self._last_ms = max((log.last_ms for log in logs.values()), default=0)
        if until_ms is not None:
            self._last_ms = min(self._last_ms, until_ms)

    def batches(self, stop: threading.Event) -> Generator[EventBatch]:
        """Yield the batches in order; see :class:`trainer.stream.sources.source.EventFeed`."""
        merge = TimeMerge(self.position)
        max_rows = min(_MAX_ROWS, max(1, self._config.buffer_events // max(1, len(self.position))))
        chunks = {partition: self._logs[partition].chunks(at[0], max_rows) for partition, at in self.position.items()}
        # At a speed, a batch covers the event time that passes in ``linger_seconds``.
        played_ms = max(1, round(self._config.linger_seconds * 1000 * self._config.speed)) if self._config.speed else 0
        ticks_ms = [tick_ms for tick_ms in (played_ms, self._slice_ms) if tick_ms]
        while not stop.is_set():
            # A partition is read only when it has no events in memory, which bounds memory.
            for partition in [partition for partition in chunks if not merge.held(partition)]:
                columns = self._until(next(chunks[partition], None))
                if columns is None:
                    merge.wait_for(partition, False)
                    del chunks[partition]
                else:
                    merge.append(partition, columns, self._features[partition].lookup(columns))
            while (batch := merge.take(self._config.batch_events, ticks_ms=ticks_ms, rest=not chunks)) is not None:
                yield self._when_due(batch, stop)
            if not chunks:
                return

    def backlog(self, position: Position) -> tuple[int, int]:
        """Return the backlog after a position; events after ``until_ms`` are counted, because they are in the files."""
        waiting = sum(self._logs[partition].rows - at[0] for partition, at in position.items())
        newest = self._last_ms
        if self._config.speed:
            # A live stream would not have the later events yet.
            newest = min(newest, self._anchor_ms + int((time.time() - self._began) * 1000 * self._config.speed))
        return waiting, newest

    def _until(self, columns: Columns | None) -> Columns | None:
        """Return the part of a portion before ``until_ms``; None at the end."""
        if columns is None or self._until_ms is None or columns["time_ms"][-1] < self._until_ms:
            return columns
        stop = int(np.searchsorted(columns["time_ms"], self._until_ms))
        # The next portion starts after the end, so it gives None.
        return {name: column[:stop] for name, column in columns.items()} if stop else None

    def _when_due(self, batch: EventBatch, stop: threading.Event) -> EventBatch:
        """Wait until the batch is due; return it with its arrival times."""
        if not self._config.speed:
            return replace(batch, arrived_ms=np.full(len(batch), round(time.time() * 1000)))
        since = (batch.events["time_ms"] - self._anchor_ms) / (1000 * self._config.speed)
        due = self._began + since
        # Waiting on the event lets ``close`` interrupt a long pause.
        stop.wait(max(0.0, float(due[-1]) - time.time()))
        return replace(batch, arrived_ms=(np.maximum(due, self._began) * 1000).astype(np.int64))
