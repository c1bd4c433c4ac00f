"""Some lines of a source's table, converted column by column; a bad value is named by file, row, column and value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.data.importers import field_parsers
from trainer.data.importers.table_files import convert, read_batches, refuse
from trainer.data.writing.builder import Progress

_LONGEST_MS = np.iinfo(np.int32).max


class Part:
    """A batch of a file, and the number of its first row, counted from 1."""

    def __init__(self, batch: pa.RecordBatch, file: Path, first_row: int) -> None:
        self.file = file
        self.first_row = first_row
        self.rows = batch.num_rows
        self._batch = batch

    def column(self, name: str) -> pa.Array:
        """A column as it was read."""
        return self._batch.column(name)

    def convert(self, name: str, function: Callable[[pa.Array], pa.Array], accepted: str) -> np.ndarray:
        """``function`` of a column; see ``tables.convert``."""
        converted = convert(self.column(name), function, self.file, name, self.first_row, accepted)
        return converted.to_numpy(zero_copy_only=False)

    def ids(self, name: str) -> np.ndarray:
        """Whole numbers, 0 or more, ``[rows] int64``."""
        return self.convert(name, field_parsers.integer_ids, "a whole number, 0 or more")

    def numbers(self, name: str) -> np.ndarray:
        """``[rows] float64``; missing is 0, true and false are 1 and 0."""
        return self.convert(name, field_parsers.numbers, "a finite number, true or false")

    def times(self, name: str, timezone: str) -> np.ndarray:
        """Milliseconds since 1970, ISO 8601 or Arrow times, as milliseconds UTC, ``[rows] int64``."""
        read = partial(field_parsers.times_ms, unit="ms", timezone=timezone)
        return self.convert(name, read, "a time between 2000 and 2100: milliseconds since 1970, or ISO 8601")

    def days(self, name: str) -> np.ndarray:
        """Dates as days since 1970, ``[rows] int64``; missing is -1."""
        return self.convert(name, _days, "a date such as 2025-05-25").astype(np.int64)

    def milliseconds(self, name: str) -> np.ndarray:
        """A length of time, ``[rows] int64``; missing is 0."""
        values = self.numbers(name)
        self.require((values >= 0) & (values <= _LONGEST_MS), name, "milliseconds, 0 to 2^31 - 1")
        return values.astype(np.int64)

    def require(self, good: np.ndarray, name: str, accepted: str) -> None:
        """Raise for the first row in which ``good`` is not set.

        Raises:
            UserError: names file, row, column, value and what would be ``accepted``.
        """
        if not good.all():
            self.refuse(name, int(np.argmin(good)), accepted)

    def refuse(self, name: str, place: int, accepted: str) -> NoReturn:
        """Raise for the value in line ``place`` of this part."""
        refuse(self.file, self.first_row + place, name, self.column(name)[place].as_py(), accepted)


def read_parts(file: Path, types: Mapping[str, pa.DataType | None], *, multiline: bool = False) -> Iterator[Part]:
    """The columns ``types`` of a file, part by part; see ``tables.read_batches``."""
    row = 1
    for batch in read_batches(file, types, multiline=multiline):
        yield Part(batch, file, row)
        row += batch.num_rows


def _days(values: pa.Array) -> pa.Array:
    return pc.fill_null(values.cast(pa.date32()).cast(pa.int32()), -1)


class Reading:
    """Reads the files of a source, and tells how many of their bytes are read; a file counts when it is done.

    Args:
        files: those that will be read.
        progress: told ``reading files``, bytes read and bytes in all.
    """

    def __init__(self, files: Iterable[Path], progress: Progress | None) -> None:
        self._sizes = {file: file.stat().st_size for file in files}
        self._read: set[Path] = set()
        self._progress = progress

    def parts(self, file: Path, types: Mapping[str, pa.DataType | None], *, multiline: bool = False) -> Iterator[Part]:
        """As ``read_parts``; a file that is read again counts once."""
        self._tell()
        yield from read_parts(file, types, multiline=multiline)
        self._read.add(file)
        self._tell()

    def _tell(self) -> None:
        if self._progress is not None:
            done = sum(self._sizes[file] for file in self._read)
            self._progress("reading files", done, sum(self._sizes.values()))
