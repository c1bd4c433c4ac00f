"""Parquet tables of a dataset, verified and read in bounded memory.

A Parquet file of some kilobytes can stand for terabytes: a run of equal numbers, or a long text in a dictionary that
every row names. The sizes in its footer are promises of its writer. So a table is read in row groups, texts are read as
dictionaries and measured before they are written out, and the reading stops with one line at a limit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trainer.console.errors import UserError
from trainer.console.text_table import size_text
from trainer.data.format import storage
from trainer.data.format.dataset_files import DatasetFiles
from trainer.runtime.stored_files import open_regular

_MAX_RATIO = 1000
"""Largest size of a table in memory for each byte of its file; tables of ids and texts have 2 to 50."""

_SMALL_BYTES = 1 << 30
"""Size in memory up to which any file is read."""

_PAGE_BYTES = 1 << 20


def read_table(
    files: DatasetFiles, name: str, columns: Sequence[str] | None = None, optional: Sequence[str] = ()
) -> pa.Table:
    """Read a table of a dataset, and compare the file with its checksum.

    Args:
        files: of the dataset.
        name: of the file, such as ``texts/items.parquet``.
        columns: columns to read, all by default.
        optional: columns to read as well if the table has them.

    Raises:
        FileNotFoundError: the dataset has no such table.
        UserError: the file is damaged, has no such column, or would need more memory than it can be meant to.
    """
    file = storage.join(files.path, name)
    data = files.read(name)
    with readable(file):
        with pq.ParquetFile(pa.BufferReader(data)) as source:
            schema, metadata = source.schema_arrow, source.metadata
        missing = [column for column in columns or () if column not in schema.names]
        if missing:
            raise UserError(f"{file}: column {missing[0]!r} is missing")
        if columns is not None:
            columns = [*columns, *(column for column in optional if column in schema.names)]
        texts = [field.name for field in schema if _is_text(field.type)]
        with pq.ParquetFile(pa.BufferReader(data), metadata=metadata, read_dictionary=texts) as source:
            return _read_bounded(source, schema, columns, _limit(len(data)), file)


@contextmanager
def open_table(files: DatasetFiles, name: str) -> Iterator[pq.ParquetFile]:
    """Open a table of a dataset that is read in batches; it is not verified. Pages are decoded one by one.

    Raises:
        FileNotFoundError: the dataset has no such table.
        UserError: the file is damaged or not a regular file.
    """
    with readable(storage.join(files.path, name)), open_parquet(files, name) as source:
        yield source


def table_footer(files: DatasetFiles, name: str) -> tuple[pa.Schema, dict[bytes, bytes]]:
    """Return the columns and the metadata of a table of a dataset; nothing but its footer is read.

    Raises:
        FileNotFoundError: the dataset has no such table.
        UserError: the file is damaged or not a regular file.
    """
    with readable(storage.join(files.path, name)), open_parquet(files, name, ()) as source:
        return source.schema_arrow, dict(source.metadata.metadata or {})


def open_parquet(files: DatasetFiles, name: str, dictionaries: Sequence[str] = ("event",)) -> pq.ParquetFile:
    """Return an opened table of a dataset, of which pages are decoded one by one; texts of some columns stay codes.

    Raises:
        FileNotFoundError: the dataset has no such table.
        OSError: it cannot be read.
        pa.ArrowException: it is damaged.
        UserError: it is not a regular file.
    """
    place = files.locate(name)
    filesystem = None
    if storage.is_remote(place):
        filesystem, place = storage.open_url(place)
    else:
        # Arrow would wait for the writer of a FIFO.
        open_regular(Path(place)).close()
    # With a buffer, pages are decoded one by one; without it, a whole row group would be read into memory. The names of
    # events stay a dictionary, whatever their length.
    return pq.ParquetFile(place, filesystem=filesystem, buffer_size=_PAGE_BYTES, read_dictionary=list(dictionaries))


@contextmanager
def readable(file: str | Path) -> Iterator[None]:
    """Turn errors of Arrow about a Parquet file into one line.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it cannot be read.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{file}: not a readable Parquet file ({reason:.200})") from None


def _read_bounded(
    source: pq.ParquetFile, schema: pa.Schema, columns: Sequence[str] | None, limit: int, file: str
) -> pa.Table:
    """Read a table in row groups.

    Args:
        source: opened with all texts as dictionaries.
        schema: types of the columns.
        columns: columns to read, all by default.
        limit: largest size of the table in memory, in bytes.
        file: name for messages.

    Raises:
        UserError: the table is larger.
    """
    names = list(schema.names if columns is None else columns)
    parts, used = [], 0
    for group in range(source.metadata.num_row_groups):
        _check(used + _promised(source.metadata.row_group(group), names), limit, file)
        part = source.read_row_group(group, columns=names, use_threads=False)
        used += _needed(part)
        _check(used, limit, file)
        for place, name in enumerate(part.column_names):
            kind = schema.field(name).type
            if part.schema.field(place).type != kind:
                part = part.set_column(place, schema.field(name), part.column(place).cast(kind))
        parts.append(part)
    wanted = pa.schema([schema.field(name) for name in names])
    table = pa.concat_tables(parts) if parts else wanted.empty_table()
    if table.num_rows != source.metadata.num_rows:
        raise UserError(
            f"{file}: damaged, it has {table.num_rows:,} rows, and its footer says {source.metadata.num_rows:,}"
        )
    return table.select(names)


def _promised(group: pq.RowGroupMetaData, names: Sequence[str]) -> int:
    """Return the bytes that the fixed-width columns of a row group need, by its footer."""
    widths = {"INT32": 4, "INT64": 8, "FLOAT": 4, "DOUBLE": 8, "BOOLEAN": 1, "INT96": 8, "BYTE_ARRAY": 4}
    columns = [group.column(place) for place in range(group.num_columns)]
    return sum(
        column.num_values * widths.get(column.physical_type, 16)
        for column in columns
        if column.path_in_schema.split(".")[0] in names
    )


def _needed(table: pa.Table) -> int:
    """Return the bytes of a table whose texts are dictionaries, if they are written out."""
    size = 0
    for column in table.columns:
        for chunk in column.chunks:
            size += chunk.nbytes
            if pa.types.is_dictionary(chunk.type) and _is_text(chunk.type.value_type):
                lengths = pc.binary_length(chunk.dictionary).fill_null(0).to_numpy(zero_copy_only=False)
                counts = np.bincount(chunk.indices.drop_null().to_numpy(zero_copy_only=False), minlength=len(lengths))
                size += int(counts @ lengths.astype(np.int64)) if len(lengths) else 0
    return size


def _check(size: int, limit: int, file: str) -> None:
    if size > limit:
        raise UserError(
            f"{file}: needs more than {size_text(limit)} of memory; it is damaged, made to fill the memory, or too "
            "large for this machine"
        )


def _limit(size: int) -> int:
    """Return the largest size in memory of a table whose file has ``size`` bytes."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(memory, max(_SMALL_BYTES, _MAX_RATIO * size))


def _is_text(kind: pa.DataType) -> bool:
    return any(
        test(kind)
        for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    )
