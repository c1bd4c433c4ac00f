"""Streaming columns out of CSV and Parquet files, with mistakes named by file, row and column.

Rows are counted from 1, the header of a CSV file not counted.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from trainer.console.errors import UserError

_BLOCK_BYTES = 1 << 24
_BATCH_ROWS = 1 << 17
_NULLS = ["", "NULL", "null", "NaN", "nan"]
_OTHER_DELIMITERS = (";", "|")


def is_table(file: Path) -> bool:
    """Whether the name is that of a table that can be read."""
    return file.name.endswith((".csv", ".csv.gz", ".parquet"))


def column_names(file: Path) -> list[str]:
    """Names of a table's columns.

    Raises:
        UserError: no such file, no table, or empty.
    """
    try:
        if file.name.endswith(".parquet"):
            return list(pq.read_schema(file).names)
        header = _header(file).rstrip("\r")
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{file}: cannot be read as a table ({error})") from None
    if not header:
        raise UserError(f"{file}: is empty; a table begins with a line of column names")
    return next(csv.reader([header], delimiter=_delimiter(header)))


def read_batches(
    file: Path, types: Mapping[str, pa.DataType | None], *, block_bytes: int = _BLOCK_BYTES, multiline: bool = False
) -> Iterator[pa.RecordBatch]:
    """The columns named in ``types``, in that order, in bounded memory: a few blocks of 16 MB at a time.

    Args:
        file: ``.csv``, ``.csv.gz`` (comma or, if the header has one, tab; a header line, UTF-8) or ``.parquet``.
        types: column -> type it is converted to; None leaves Parquet columns as they are and CSV columns as text.
        block_bytes: size of a block of a CSV file.
        multiline: quoted text of a CSV file may contain line breaks, which costs time; and where lines end with a line
            feed alone, any text may contain carriage returns, which become spaces.

    Raises:
        UserError: a column is missing, a line has too few or too many fields, or a value does not fit its type.
    """
    names = column_names(file)
    for name in types:
        if name not in names:
            delimiter = next((mark for mark in _OTHER_DELIMITERS if len(names) == 1 and mark in names[0]), None)
            hint = "" if delimiter is None else f" (separated by {delimiter!r}? it must be a comma or a tab)"
            raise UserError(f"{file}: column {name!r} is missing; there are {', '.join(names)}{hint}")
    if file.name.endswith(".parquet"):
        yield from _parquet_batches(file, types)
        return
    typed = {name: kind if kind is not None else pa.string() for name, kind in types.items()}
    try:
        yield from _csv_batches(file, typed, block_bytes, multiline, threads=True)
    except pa.ArrowInvalid:
        # The threaded reader knows no row numbers; the second, slow pass raises with one.
        _blame(file, typed, block_bytes, multiline)
        raise


def convert(
    values: pa.Array, function: Callable[[pa.Array], pa.Array], file: Path, column: str, first_row: int, accepted: str
) -> pa.Array:
    """``function(values)``; a value that it refuses is named.

    Args:
        values: a part of a column.
        function: works value by value and raises ``pa.ArrowException`` for a value that it cannot take.
        file: named in the error, as is ``column``.
        column: see ``file``.
        first_row: number of the row of ``values[0]``.
        accepted: what the function takes.

    Raises:
        UserError: a value was refused; names file, row, column, value and what would be accepted.
    """
    try:
        return function(values)
    except pa.ArrowException:
        good, bad = 0, len(values)
    while bad - good > 1:
        middle = (good + bad) // 2
        try:
            function(values.slice(good, middle - good))
            good = middle
        except pa.ArrowException:
            bad = middle
    refuse(file, first_row + good, column, values[good].as_py(), accepted)


def refuse(file: Path, row: int, column: str, value: object, accepted: str) -> NoReturn:
    """Raise the error of a bad value.

    Raises:
        UserError: always.
    """
    raise UserError(f"{file}: row {row}: column {column!r} is {value!r}; it must be {accepted}")


def _header(file: Path) -> str:
    """The first line, without its line feed."""
    with pa.input_stream(str(file)) as stream:
        line: bytes = stream.read(_BLOCK_BYTES).split(b"\n", 1)[0]
    return line.decode("utf-8-sig")


def _delimiter(header: str) -> str:
    return "\t" if "\t" in header else ","


def _parquet_batches(file: Path, types: Mapping[str, pa.DataType | None]) -> Iterator[pa.RecordBatch]:
    row = 1
    for batch in pq.ParquetFile(file).iter_batches(_BATCH_ROWS, columns=list(types)):
        arrays = []
        for name, kind in types.items():
            values = batch.column(name)
            if kind is not None and values.type != kind:
                values = convert(values, partial(pc.cast, target_type=kind), file, name, row, str(kind))
            arrays.append(values)
        yield pa.record_batch(arrays, names=list(types))
        row += batch.num_rows


def _csv_batches(
    file: Path, types: Mapping[str, pa.DataType], block_bytes: int, multiline: bool, *, threads: bool
) -> Iterator[pa.RecordBatch]:
    header = _header(file)
    source: Any = file
    if multiline and not header.endswith("\r"):
        source = pa.TransformInputStream(
            pa.input_stream(str(file)), lambda block: block.to_pybytes().replace(b"\r", b" ")
        )
    reader = pa.csv.open_csv(
        source,
        read_options=pa.csv.ReadOptions(block_size=block_bytes, use_threads=threads),
        parse_options=pa.csv.ParseOptions(delimiter=_delimiter(header), newlines_in_values=multiline),
        convert_options=pa.csv.ConvertOptions(
            column_types=types, include_columns=list(types), null_values=_NULLS, strings_can_be_null=True
        ),
    )
    with reader:
        yield from reader


def _blame(file: Path, types: Mapping[str, pa.DataType], block_bytes: int, multiline: bool) -> None:
    row = 1
    try:
        for batch in _csv_batches(file, dict.fromkeys(types, pa.string()), block_bytes, multiline, threads=False):
            for name, kind in types.items():
                convert(batch.column(name), partial(pc.cast, target_type=kind), file, name, row, str(kind))
            row += batch.num_rows
    except pa.ArrowInvalid as error:
        # "... Row #7: Expected 19 columns, got 3: <the line>", where the header is counted.
        place = re.search(r"Row #(\d+): (.*)", str(error))
        said = f"line {place[1]}: {place[2]}" if place else str(error)
        raise UserError(f"{file}: {said}") from None
