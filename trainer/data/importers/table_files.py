"""Streaming reader of columns from CSV and Parquet files; errors name file, row and column.

Rows are counted from 1; the header of a CSV file does not count.
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

from trainer.console.errors import UserError, one_line
from trainer.data.format.column_types import WrongType, simplify
from trainer.data.importers import field_parsers
from trainer.data.importers.null_markers import VALUE_NULLS, without_markers

_BLOCK_BYTES = 1 << 24
_BATCH_ROWS = 1 << 17
_LONGEST_SHOWN = 200
_OTHER_DELIMITERS = (";", "|")


def is_table(file: Path) -> bool:
    """True if the file name has the suffix of a table that this module reads."""
    return file.name.endswith((".csv", ".csv.gz", ".parquet"))


def column_names(file: Path) -> list[str]:
    """Return the names of a table's columns.

    Raises:
        UserError: the file does not exist, is no table, or is empty.
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
        raise UserError(f"{file}: is empty; the first line of a table must have the column names")
    try:
        return next(csv.reader([header], delimiter=_delimiter(header)))
    except csv.Error:
        raise UserError(
            f"{file}: a line ends with a carriage return alone; lines must end with a line feed, or with both (write "
            "them anew: tr '\\r' '\\n')"
        ) from None


def read_batches(
    file: Path,
    types: Mapping[str, pa.DataType | None],
    *,
    block_bytes: int = _BLOCK_BYTES,
    multiline: bool = False,
    partition: tuple[str, ...] = (),
) -> Iterator[pa.RecordBatch]:
    """Yield the columns named in ``types``, in that order, in bounded memory: a few blocks of 16 MB at a time.

    Args:
        file: ``.csv`` or ``.csv.gz`` (UTF-8, with a header line; separated by tabs if the header has one, else by
            commas), or ``.parquet``.
        types: type of each column after conversion; None gives Parquet columns as ``column_types.simplify`` does, and
            CSV columns as text. A list type gives a Parquet column unchanged, for a caller that reads lists.
        block_bytes: size of a block of a CSV file.
        multiline: True if quoted text of a CSV file may contain line breaks, which is slower. If lines end with a line
            feed only, text may then also contain carriage returns; they become spaces.
        partition: columns that the path of the file has, for the message that a column is missing.

    Raises:
        UserError: a column is missing or there twice, its type cannot be read, a line has too few or too many fields,
            or a value does not fit its type.
    """
    names = column_names(file)
    for name in types:
        if names.count(name) > 1:
            raise UserError(f"{file}: {names.count(name)} columns have the name {name!r}; only one may have it")
        if name not in names:
            delimiter = next((mark for mark in _OTHER_DELIMITERS if len(names) == 1 and mark in names[0]), None)
            hint = "" if delimiter is None else f" (separated by {delimiter!r}? it must be a comma or a tab)"
            raise UserError(f"{file}: column {name!r} is missing; there are {', '.join((*names, *partition))}{hint}")
    if file.name.endswith(".parquet"):
        yield from _parquet_batches(file, types)
        return
    typed = {name: kind if kind is not None else pa.string() for name, kind in types.items()}
    done = 0
    try:
        for batch in _csv_batches(file, typed, block_bytes, multiline, threads=True):
            yield batch
            done += batch.num_rows
    except pa.ArrowInvalid:
        # Arrow's conversion knows no row numbers, and refuses some values that a Parquet file may have, such as white
        # space for a missing number. A second, slow pass reads them, or raises the error with the row.
        yield from _batches_of_text(file, typed, block_bytes, multiline, done)


def convert(
    values: pa.Array, function: Callable[[pa.Array], pa.Array], file: Path, column: str, first_row: int, accepted: str
) -> pa.Array:
    """Return ``function(values)``; if it fails, find the first bad value and name it in the error.

    Args:
        values: part of a column.
        function: works value by value and raises ``pa.ArrowException`` for a bad value.
        file: file name for the error.
        column: column name for the error.
        first_row: number of the row of ``values[0]``.
        accepted: description of the values that the function accepts.

    Raises:
        UserError: the function raised; names file, row, column, value and what would be accepted.
    """
    try:
        return function(values)
    except WrongType as error:
        raise UserError(
            f"{file}: column {column!r} has the type {values.type}, which cannot be read here; accepted are {error}"
        ) from None
    except pa.ArrowException:
        # bisection: all of values[:good] are good, and values[:bad] has a bad value
        good, bad = 0, len(values)
    while bad - good > 1:
        middle = (good + bad) // 2
        try:
            function(values.slice(good, middle - good))
            good = middle
        except pa.ArrowException:
            bad = middle
    raise_bad_value(file, first_row + good, column, python_value(values[good]), accepted)


def python_value(value: pa.Scalar) -> object:
    """Return a value as a Python object; as text or a number if Python has none for it, such as for nanoseconds."""
    try:
        return value.as_py()
    except (ValueError, OverflowError):
        return str(value.cast(pa.int64() if value.type.bit_width == 64 else pa.int32()).as_py())


def raise_bad_value(file: Path, row: int, column: str, value: object, accepted: str) -> NoReturn:
    """Raise the error of a bad value.

    Raises:
        UserError: always.
    """
    shown = "empty" if value is None or value == "" else repr(value)
    if len(shown) > _LONGEST_SHOWN:
        shown = f"{shown[:_LONGEST_SHOWN]}..."
    raise UserError(f"{file}: row {row}: column {column!r} is {shown}; it must be {accepted}")


def _header(file: Path) -> str:
    """Return the first line without its line feed."""
    with pa.input_stream(str(file)) as stream:
        line: bytes = stream.read(_BLOCK_BYTES).split(b"\n", 1)[0]
    return line.decode("utf-8-sig")


def _delimiter(header: str) -> str:
    """Return the delimiter of a CSV file: a tab if the header has one, else a comma."""
    return "\t" if "\t" in header else ","


def _parquet_batches(file: Path, types: Mapping[str, pa.DataType | None]) -> Iterator[pa.RecordBatch]:
    """Yield the columns of a Parquet file; see ``read_batches``."""
    row = 1
    batches = pq.ParquetFile(file).iter_batches(_BATCH_ROWS, columns=list(types))
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (pa.ArrowException, OSError) as error:
            # Named here, because the writer of the dataset would take an OSError for one of its own files.
            raise UserError(f"{file}: damaged after row {row - 1:,} ({one_line(error)})") from None
        arrays = []
        for name, kind in types.items():
            values = batch.column(name)
            if kind is not None and pa.types.is_list(kind):
                arrays.append(values)
                continue
            values = convert(values, simplify, file, name, row, "UTF-8 text")
            if kind is not None and values.type != kind:
                values = _typed(values, kind, file, name, row)
            arrays.append(values)
        yield pa.record_batch(arrays, names=list(types))
        row += batch.num_rows


def _typed(values: pa.Array, kind: pa.DataType, file: Path, column: str, first_row: int) -> pa.Array:
    """Return part of a column cast to ``kind`` without loss; the other arguments are for the error, see ``convert``."""
    values = values if kind == pa.string() else without_markers(values, VALUE_NULLS)
    function: Callable[[pa.Array], pa.Array] = partial(pc.cast, target_type=kind)
    accepted = str(kind)
    if kind == pa.int64() and pa.types.is_floating(values.type):
        function = field_parsers.whole_numbers
        accepted = field_parsers.accepted_ids(values.type)
    return convert(values, function, file, column, first_row, accepted)


def _csv_batches(
    file: Path, types: Mapping[str, pa.DataType], block_bytes: int, multiline: bool, *, threads: bool
) -> Iterator[pa.RecordBatch]:
    """Yield the columns of a CSV file; see ``read_batches``.

    Raises:
        pa.ArrowInvalid: bad input; the message has a row number only without ``threads``.
    """
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
            column_types=types,
            include_columns=list(types),
            null_values=["", *VALUE_NULLS],
            # Which texts mean that there is no value depends on the meaning of the column: its parser decides.
            strings_can_be_null=False,
        ),
    )
    with reader:
        yield from reader


def _batches_of_text(
    file: Path, types: Mapping[str, pa.DataType], block_bytes: int, multiline: bool, done: int
) -> Iterator[pa.RecordBatch]:
    """Yield the columns of a CSV file from row ``done`` on (from 0), with the values read as those of a Parquet file.

    Raises:
        UserError: a line or a value is bad; names the row.
    """
    row = 1
    try:
        for batch in _csv_batches(file, dict.fromkeys(types, pa.string()), block_bytes, multiline, threads=False):
            arrays = [_typed(batch.column(name), kind, file, name, row) for name, kind in types.items()]
            known = max(0, done + 1 - row)
            row += batch.num_rows
            if known < batch.num_rows:
                yield pa.record_batch(arrays, names=list(types)).slice(known)
    except pa.ArrowInvalid as error:
        # Arrow writes "... Row #7: Expected 19 columns, got 3: <the line>" and counts the header.
        match = re.search(r"Row #(\d+): (.*)", str(error))
        message = f"line {match[1]}: {match[2]}" if match else str(error)
        raise UserError(f"{file}: {message}") from None
