"""Files of a user's own log, and the partition columns in their paths.

A folder of a Hive table has files such as ``dt=2022-05-04/hour=03/part-0.parquet``. The folders ``key=value`` of a
path, those of the log's own folder included, are columns of the file. Names are percent-decoded, and the value
``__HIVE_DEFAULT_PARTITION__`` is no value, as in Hive and Spark. Hidden files are left out likewise: those below a name
that begins with ``_`` or ``.``, unless it is a partition.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

from trainer.console.errors import UserError
from trainer.data.importers.category_codes import category_text
from trainer.data.importers.table_files import column_names, convert, is_table, read_batches

_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class LogFile:
    """File of a log.

    Attributes:
        path: the file.
        name: its path in the folder of the log.
        partition: values of the partition columns; None is no value.
    """

    path: Path
    name: str
    partition: Mapping[str, str | None]


@dataclass(frozen=True)
class LogFiles:
    """Files of a log in reading order, and the names of the files of its folder that are not read."""

    read: tuple[LogFile, ...]
    left_out: tuple[str, ...]


def find_log_files(src: Path, pattern: str, others: set[Path]) -> LogFiles:
    """Return ``src`` itself if it is a table, or else the tables in the folder ``src`` that match ``pattern``.

    Hidden files and the files in ``others`` are left out, and belong to no log.

    Raises:
        UserError: there is no such file, or a path has a partition column twice or one that is no UTF-8.
    """
    if src.is_file() and is_table(src):
        return LogFiles((LogFile(src, src.name, partition_of(src, src.parent)),), ())
    visible = [file for file in sorted(src.rglob("*")) if _visible(file, src)] if src.is_dir() else []
    visible = [file for file in visible if file.resolve() not in others]
    matching = set(src.glob(pattern)) if src.is_dir() else set()
    read = [file for file in visible if file in matching and is_table(file)]
    if not read:
        raise UserError(
            f"{src}: no .csv, .csv.gz or .parquet file here that matches files = {pattern!r}{_hint(src, visible)}"
        )
    left_out = tuple(file.relative_to(src).as_posix() for file in visible if file not in set(read))
    files = (LogFile(file, file.relative_to(src).as_posix(), partition_of(file, src)) for file in read)
    return LogFiles(tuple(files), left_out)


def read_partitioned(
    file: Path, types: Mapping[str, pa.DataType | None], partition: Mapping[str, str | None], *, multiline: bool
) -> Iterator[pa.RecordBatch]:
    """Yield batches as ``table_files.read_batches``; columns that only ``partition`` has are constants, as text.

    Raises:
        UserError: the errors of ``read_batches``; or a column of the file differs from the path.
    """
    names = column_names(file)
    stored = {name: kind for name, kind in types.items() if name in names or name not in partition}
    if not stored:
        # Some column is needed to know the number of rows; a list type asks for it unchanged.
        stored = {names[0]: pa.list_(pa.null()) if file.name.endswith(".parquet") else None}
    row = 1
    for batch in read_batches(file, stored, multiline=multiline, partition=tuple(partition)):
        arrays = []
        for name in types:
            if name not in stored:
                arrays.append(pa.array([partition[name]], pa.string()).take(pa.array([0] * batch.num_rows, pa.int32())))
                continue
            arrays.append(batch.column(name))
            if name in partition:
                _check_agreement(arrays[-1], partition[name], file, name, row)
        yield pa.record_batch(arrays, names=list(types))
        row += batch.num_rows


def _check_agreement(values: pa.Array, text: str | None, file: Path, name: str, first_row: int) -> None:
    """Check that a column of a file has the value of the file's path in every row.

    Raises:
        UserError: it has another one; names file, row, column and both values.
    """

    def check(part: pa.Array) -> pa.Array:
        if not all(_agrees(value, text) for value in pc.unique(part)):
            raise pa.ArrowInvalid("another value")
        return part

    shown = "empty" if text is None else repr(text)
    convert(values, check, file, name, first_row, f"{shown}, as in the path of the file")


def _agrees(value: pa.Scalar, text: str | None) -> bool:
    """True if a value in a file is the one of a path; ``3`` and ``03`` are one number."""
    if not value.is_valid or text is None:
        return not value.is_valid and text is None
    if category_text(pa.array([value.as_py()], value.type)) == category_text(pa.array([text])):
        return True
    kind = pa.int64() if pa.types.is_string(value.type) else value.type
    try:
        return bool(pa.scalar(text).cast(kind) == value.cast(kind))
    except (pa.ArrowException, NotImplementedError):
        return False


def _visible(file: Path, src: Path) -> bool:
    """True if a file is no folder, and neither hidden nor below a hidden folder."""
    parts = file.relative_to(src).parts
    hidden = any(part.startswith(".") or (part.startswith("_") and "=" not in part) for part in parts)
    return not hidden and file.is_file()


def _hint(src: Path, visible: Iterable[Path]) -> str:
    """Return the pattern that would match the tables below ``src``, for the message that none matches."""
    tables = [file for file in visible if is_table(file)]
    if not tables:
        return ""
    ending = "*.parquet" if all(file.name.endswith(".parquet") for file in tables) else "*"
    return (
        f"; other names of tables there: {len(tables):,}, such as {tables[0].relative_to(src).as_posix()}: set "
        f'files = "**/{ending}" in the mapping'
    )


def partition_of(file: Path, src: Path) -> dict[str, str | None]:
    """Return the partition columns in the path of a file, from the outermost ``key=value`` above ``src`` on.

    Raises:
        UserError: a key comes twice with different values, or a name is no UTF-8.
    """
    top = src
    while "=" in top.name:
        top = top.parent
    values: dict[str, str | None] = {}
    for part in file.relative_to(top).parts[:-1]:
        key, equals, value = part.partition("=")
        if not equals:
            continue
        try:
            key, value = unquote(key, errors="strict"), unquote(value, errors="strict")
        except UnicodeDecodeError:
            raise UserError(f"{file}: the folder {part!r} is not UTF-8 when it is percent-decoded") from None
        decoded = None if value in ("", _NO_VALUE) else value
        if values.setdefault(key, decoded) != decoded:
            raise UserError(f"{file}: the path has two values of {key!r}: {values[key]!r} and {decoded!r}")
    return values
