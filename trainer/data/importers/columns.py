"""Batches of a source's table with columns as canonical values.

The error of a bad value names file, row, column and value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.data.format.times import accepted_times, times_ms
from trainer.data.importers import field_parsers
from trainer.data.importers.category_codes import accepted_categories, distinct_values, encode
from trainer.data.importers.log_files import read_partitioned
from trainer.data.importers.null_markers import DEFAULT_NULLS, NullMarkers, without_markers
from trainer.data.importers.table_files import convert, python_value, raise_bad_value, read_batches
from trainer.data.writing.builder import Progress

LONGEST_MS = np.iinfo(np.int32).max
LARGEST_COUNT = 2.0**53
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


class ColumnBatch:
    """Batch of consecutive rows of a file, with conversions of its columns.

    Args:
        batch: the columns as they were read.
        file: named in errors.
        first_row: number of the first row in the file, from 1.
        nulls: null markers of the columns.
    """

    def __init__(self, batch: pa.RecordBatch, file: Path, first_row: int, nulls: NullMarkers = DEFAULT_NULLS) -> None:
        self.file = file
        self.first_row = first_row
        self.rows = batch.num_rows
        self._batch = batch
        self._nulls = nulls

    def column(self, name: str) -> pa.Array:
        """Return a column as it was read."""
        return self._batch.column(name)

    def convert(self, name: str, function: Callable[[pa.Array], pa.Array], accepted: str) -> np.ndarray:
        """Return ``function(column)`` as a numpy array; see ``table_files.convert``."""
        converted = convert(self.column(name), function, self.file, name, self.first_row, accepted)
        return converted.to_numpy(zero_copy_only=False)

    def ids(self, name: str, hash_column: str = "") -> np.ndarray:
        """Return a column of ids, whole numbers of 0 or more, as ``[rows] int64``.

        ``hash_column`` is its canonical name if ``hash_ids`` of a mapping may name it.
        """
        accepted = field_parsers.accepted_ids(self.column(name).type, hash_column)
        return self.convert(name, field_parsers.integer_ids, accepted)

    def hashed_ids(self, name: str, hashing: field_parsers.IdHash) -> np.ndarray:
        """Return a column of text ids as their hashes, ``[rows] int64``."""
        kind = self.column(name).type
        accepted = "a text, and no null marker" if pa.types.is_string(kind) else field_parsers.accepted_ids(kind)
        return self.convert(name, partial(hashing.ids, nulls=self._nulls.of_id(name)), accepted)

    def numbers(self, name: str) -> np.ndarray:
        """Return a numeric column as ``[rows] float64``; missing is 0, true and false are 1 and 0."""
        read = partial(field_parsers.numbers, nulls=self._nulls.of_value(name))
        return self.convert(name, read, "a finite number, true or false")

    def small_numbers(self, name: str) -> np.ndarray:
        """Return a numeric column as ``[rows] float32``, see :meth:`numbers`."""
        values = self.numbers(name)
        self.require_float32(values, name)
        return values.astype(np.float32)

    def require_float32(self, values: np.ndarray, name: str) -> None:
        """Check that the numbers of a column are in the range of float32.

        Raises:
            UserError: one is not.
        """
        self.require(np.abs(values) <= _LARGEST_FLOAT32, name, "a number that a float32 holds, up to 3.4e38")

    def categories(self, name: str) -> set[str]:
        """Return the distinct categories of a column, without missing values."""
        found: set[str] = set()

        def read(values: pa.Array) -> pa.Array:
            found.update(distinct_values([values], self._nulls.of_value(name)))
            return values

        convert(self.column(name), read, self.file, name, self.first_row, accepted_categories(self.column(name).type))
        return found

    def codes(self, name: str, known: tuple[str, ...]) -> np.ndarray:
        """Return the codes of a column of categories, ``[rows] int32``; see ``category_codes.encode``."""
        return self.convert(
            name, lambda values: pa.array(encode(values, known)), accepted_categories(self.column(name).type)
        )

    def text(self, name: str) -> pa.Array:
        """Return a column as text; missing is empty. Null markers are texts like others."""
        return pc.fill_null(self.column(name).cast(pa.string()), "")

    def times(self, name: str, timezone: str) -> np.ndarray:
        """Return a column of times as milliseconds UTC, ``[rows] int64``.

        The column holds milliseconds since 1970, ISO 8601 text or Arrow times; ``timezone`` is that of times without
        an offset.
        """
        read = partial(times_ms, unit="ms", timezone=timezone)
        return self.convert(name, read, accepted_times(self.column(name).type, "ms", timezone))

    def days(self, name: str) -> np.ndarray:
        """Return a column of dates as days since 1970, ``[rows] int64``; missing is -1."""
        read = partial(_days, nulls=self._nulls.of_value(name))
        return self.convert(name, read, "a date such as 2025-05-25").astype(np.int64)

    def counts(self, name: str) -> np.ndarray:
        """Return a column of whole numbers that count something, ``[rows] int64``; missing is 0."""
        values = self.numbers(name)
        good = (values >= 0) & (values < LARGEST_COUNT) & (values == np.floor(values))
        self.require(good, name, "a whole number, 0 or more and below 2^53")
        return values.astype(np.int64)

    def milliseconds(self, name: str) -> np.ndarray:
        """Return a column of durations in milliseconds, ``[rows] int64``; missing is 0."""
        values = self.numbers(name)
        self.require((values >= 0) & (values <= LONGEST_MS), name, "milliseconds, 0 to 2^31 - 1")
        return values.astype(np.int64)

    def require(self, good: np.ndarray, name: str, accepted: str) -> None:
        """Check that all of ``good [rows] bool`` is True.

        Raises:
            UserError: ``good`` is False in a row; names file, row, column, value and what would be ``accepted``.
        """
        if not good.all():
            self.raise_bad_value(name, int(np.argmin(good)), accepted)

    def raise_bad_value(self, name: str, position: int, accepted: str) -> NoReturn:
        """Raise the error of a bad value at ``position`` (from 0) of this batch.

        Raises:
            UserError: always.
        """
        raise_bad_value(self.file, self.first_row + position, name, python_value(self.column(name)[position]), accepted)


def read_column_batches(
    file: Path,
    types: Mapping[str, pa.DataType | None],
    *,
    multiline: bool = False,
    nulls: NullMarkers = DEFAULT_NULLS,
    partition: Mapping[str, str | None] | None = None,
) -> Iterator[ColumnBatch]:
    """Yield the columns ``types`` of a file, batch by batch; see ``table_files.read_batches``.

    ``nulls`` are the null markers of the columns, and ``partition`` the values of partition columns, which the path of
    the file has (``log_files.py``).
    """
    row = 1
    batches = (
        read_partitioned(file, types, partition, multiline=multiline)
        if partition
        else read_batches(file, types, multiline=multiline)
    )
    for batch in batches:
        yield ColumnBatch(batch, file, row, nulls)
        row += batch.num_rows


def _days(values: pa.Array, nulls: tuple[str, ...]) -> pa.Array:
    """Return dates as days since 1970, int32; a missing date is -1."""
    values = without_markers(values, nulls)
    return pc.fill_null(values.cast(pa.date32()).cast(pa.int32()), -1)


class SourceReader:
    """Reader of the files of a source that reports its progress.

    Args:
        files: all files that will be read.
        progress: callback that gets the phase ``reading files``, the bytes of the finished files and the total bytes.
        nulls: null markers of the columns.
    """

    def __init__(self, files: Iterable[Path], progress: Progress | None, nulls: NullMarkers = DEFAULT_NULLS) -> None:
        self._nulls = nulls
        self._sizes = {file: file.stat().st_size for file in files}
        self._read: set[Path] = set()
        self._progress = progress

    def batches(
        self, file: Path, types: Mapping[str, pa.DataType | None], *, multiline: bool = False
    ) -> Iterator[ColumnBatch]:
        """Yield batches as ``read_column_batches``; a file that is read again counts once."""
        self._report()
        yield from read_column_batches(file, types, multiline=multiline, nulls=self._nulls)
        self._read.add(file)
        self._report()

    def _report(self) -> None:
        """Report the bytes of the finished files; a partly read file does not count."""
        if self._progress is not None:
            done = sum(self._sizes[file] for file in self._read)
            self._progress("reading files", done, sum(self._sizes.values()))
