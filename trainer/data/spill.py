"""Columns set aside on disk by partition, until a partition is read back."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa

from trainer.data.schema import partition_of

_ROWS_IN_MEMORY = 1 << 18
_ROWS_PER_PARTITION = 1024


class Spill:
    """Takes rows of any users and gives them back by partition, in the order in which they came.

    Each partition is one file of Arrow IPC streams behind one another, open only while it is written, and
    memory-mapped when it is read. At most about 2^18 rows, or 1,024 a partition, are in memory.

    Args:
        folder: where the files go; made here.
        schema: fixed-width columns without nulls, ``user_id`` among them.
        partitions: number of partitions.
    """

    def __init__(self, folder: Path, schema: pa.Schema, partitions: int) -> None:
        folder.mkdir(parents=True)
        self.schema = schema
        self.rows = np.zeros(partitions, np.int64)
        self._folder = folder
        self._partitions = partitions
        self._waiting: list[dict[str, np.ndarray]] = []
        self._waiting_rows = 0
        self._limit = max(_ROWS_IN_MEMORY, _ROWS_PER_PARTITION * partitions)

    def add(self, columns: dict[str, np.ndarray]) -> None:
        """Add rows; the arrays must not change afterwards."""
        rows = len(columns["user_id"])
        for first in range(0, rows, self._limit):
            part = {name: column[first : first + self._limit] for name, column in columns.items()}
            self._waiting.append(part)
            self._waiting_rows += len(part["user_id"])
            if self._waiting_rows >= self._limit:
                self.flush()

    def flush(self) -> None:
        """Write what is in memory."""
        if not self._waiting:
            return
        parts, self._waiting, self._waiting_rows = self._waiting, [], 0
        columns = parts[0]
        if len(parts) > 1:
            columns = {name: np.concatenate([part[name] for part in parts]) for name in self.schema.names}
        # numpy sorts 16-bit keys by counting.
        owner = partition_of(columns["user_id"], self._partitions).astype(np.uint16)
        order = np.argsort(owner, kind="stable")
        ends = np.cumsum(np.bincount(owner, minlength=self._partitions))
        arrays = [pa.array(np.take(columns[name], order)) for name in self.schema.names]
        batch = pa.record_batch(arrays, schema=self.schema)
        first = 0
        for partition in np.flatnonzero(np.diff(ends, prepend=0)):
            part = batch.slice(first, int(ends[partition]) - first)
            first = int(ends[partition])
            self.rows[partition] += part.num_rows
            with open(self._file(int(partition)), "ab") as file, pa.ipc.new_stream(file, self.schema) as stream:
                stream.write_batch(part)

    def pop(self, partition: int) -> dict[str, np.ndarray]:
        """All rows of a partition; its file is deleted. ``flush`` first."""
        file = self._file(partition)
        batches = []
        if file.exists():
            source = pa.memory_map(str(file))
            while source.tell() < source.size():
                batches += list(pa.ipc.open_stream(source))
            file.unlink()
        table = pa.Table.from_batches(batches, self.schema)
        return {name: table.column(name).to_numpy() for name in self.schema.names}

    def _file(self, partition: int) -> Path:
        return self._folder / f"part-{partition:05d}.arrows"


class BatchFile:
    """Batches of the same columns in one file, memory-mapped when it is complete: any number, one open file.

    Args:
        file: written here.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._writer: pa.ipc.RecordBatchFileWriter | None = None

    def __enter__(self) -> BatchFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def append(self, columns: dict[str, np.ndarray]) -> None:
        """Write one batch; empty ones count too."""
        batch = pa.record_batch({name: pa.array(column) for name, column in columns.items()})
        if self._writer is None:
            self._writer = pa.ipc.new_file(str(self._file), batch.schema)
        self._writer.write_batch(batch)

    def read(self) -> list[dict[str, np.ndarray]]:
        """The batches in the order in which they were written, memory-mapped."""
        reader = pa.ipc.open_file(pa.memory_map(str(self._file)))
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        return [{name: batch.column(name).to_numpy() for name in batch.schema.names} for batch in batches]
