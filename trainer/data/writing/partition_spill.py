"""Temporary files on disk: columns by partition until a partition is read back, and a file of batches."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa

from trainer.data.format.schema import partition_of

_ROWS_IN_MEMORY = 1 << 18
_ROWS_PER_PARTITION = 1024


class Spill:
    """Stores rows of any users on disk, and returns them by partition in the order in which they were added.

    Each partition is one file, open only during a write or read. It holds blocks of rows, each column after column. At
    most about 2^18 rows, or 1,024 rows per partition if that is more, are in memory.

    Args:
        folder: directory for the files; created here.
        schema: columns of fixed width without nulls; ``user_id`` must be one of them.
        partitions: number of partitions.
    """

    def __init__(self, folder: Path, schema: pa.Schema, partitions: int) -> None:
        folder.mkdir(parents=True)
        self._dtypes = {field.name: np.dtype(field.type.to_pandas_dtype()) for field in schema}
        self._folder = folder
        self.partitions = partitions
        self._blocks: list[list[int]] = [[] for _ in range(partitions)]
        self._waiting: list[tuple[dict[str, np.ndarray], np.ndarray]] = []
        self._waiting_rows = 0
        # With many partitions, a small buffer would write only a few rows to each file at a time.
        self._limit = max(_ROWS_IN_MEMORY, _ROWS_PER_PARTITION * partitions)

    @property
    def rows(self) -> int:
        """Number of rows written to disk so far, over all partitions."""
        return sum(sum(blocks) for blocks in self._blocks)

    def add(self, columns: dict[str, np.ndarray]) -> None:
        """Add rows."""
        rows = len(columns["user_id"])
        for first in range(0, rows, self._limit):
            part = {name: columns[name][first : first + self._limit] for name in self._dtypes}
            # For 16-bit keys numpy's stable sort is a radix sort, much faster than a comparison sort.
            owner = partition_of(part["user_id"], self.partitions).astype(np.uint16)
            order = np.argsort(owner, kind="stable")
            edges = np.append(0, np.cumsum(np.bincount(owner, minlength=self.partitions)))
            self._waiting.append(({name: np.take(column, order) for name, column in part.items()}, edges))
            self._waiting_rows += len(order)
            if self._waiting_rows >= self._limit:
                self.flush()

    def flush(self) -> None:
        """Write the rows in memory to disk."""
        for partition, blocks in enumerate(self._blocks):
            spans = [(columns, slice(*edges[partition : partition + 2])) for columns, edges in self._waiting]
            spans = [(columns, span) for columns, span in spans if span.start < span.stop]
            if not spans:
                continue
            # Opened for each write: there can be more partitions than a process may have open files.
            with open(self._file(partition), "ab") as file:
                for columns, span in spans:
                    blocks.append(int(span.stop - span.start))
                    for name, dtype in self._dtypes.items():
                        file.write(np.ascontiguousarray(columns[name][span], dtype).data)
        self._waiting, self._waiting_rows = [], 0

    def pop(self, partition: int) -> dict[str, np.ndarray]:
        """Return all rows of a partition and delete its file. Call ``flush`` before."""
        blocks = self._blocks[partition]
        columns = {name: np.empty(sum(blocks), dtype) for name, dtype in self._dtypes.items()}
        if blocks:
            with open(self._file(partition), "rb") as file:
                first = 0
                for rows in blocks:
                    for column in columns.values():
                        file.readinto(column[first : first + rows].data)
                    first += rows
            self._file(partition).unlink()
        return columns

    def _file(self, partition: int) -> Path:
        """Return the path of the file of a partition."""
        return self._folder / f"part-{partition:05d}.columns"


class BatchFile:
    """Any number of batches with the same columns in one Arrow file, which is memory-mapped once it is complete.

    Args:
        file: path of the file to write.
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
        """Write one batch; empty batches are kept too."""
        batch = pa.record_batch({name: pa.array(column) for name, column in columns.items()})
        if self._writer is None:
            self._writer = pa.ipc.new_file(str(self._file), batch.schema)
        self._writer.write_batch(batch)

    def read(self) -> list[dict[str, np.ndarray]]:
        """Return the batches, memory-mapped, in the order in which they were written."""
        reader = pa.ipc.open_file(pa.memory_map(str(self._file)))
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        return [{name: batch.column(name).to_numpy() for name in batch.schema.names} for batch in batches]
