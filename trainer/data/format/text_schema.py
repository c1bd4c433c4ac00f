"""The texts of a dataset: what videos, rooms and comments say, and how long users stay in the comments.

They lie in a folder of the dataset, one Parquet file a table, each of them optional::

    texts/items.parquet       what an item says, and its length
    texts/authors.parquet     what an author says of themselves
    texts/segments.parquet    what is said in 30 seconds of a room
    texts/comments.parquet    comments under videos
    texts/visits.parquet      one line an impression of a video: which comments, how long, which were touched
    truth/staytime.parquet    simulation only: what the staytime was drawn from, read by nothing that trains
    truth/comments.parquet    simulation only: what a comment is, read by nothing that trains

Times are integer milliseconds UTC, ids int64 and not negative, texts UTF-8. An empty text means that there is none.
A video may have any number of comments, none too: lists of comments are as long as there are comments, and whoever
needs six pads them (``pad_lists``) and masks the rest.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trainer.console.errors import UserError
from trainer.data.format import storage

FOLDER = "texts"

UNKNOWN_USER = -1
"""``user_id`` of a comment whose writer the source does not name."""

UNKNOWN_TIME = -1
"""``time_ms`` of a comment whose time the source does not give; it counts as there from the beginning."""

NO_COMMENT = -1
"""Fills up lists of comments."""

SEGMENTS_PER_ITEM = 1 << 16
"""22 days of 30-second segments; see ``segment_ids``."""

_IDS = pa.list_(pa.int64())

ITEMS = pa.schema(
    [
        ("item_id", pa.int64()),
        ("author_id", pa.int64()),
        ("domain", pa.int8()),
        ("duration_ms", pa.int64()),
        ("tag", pa.string()),
        ("text", pa.string()),
    ]
)
"""``duration_ms`` is that of a video and 0 where it is not known, as a room's is not before its end; ``tag`` is a
category's name."""

AUTHORS = pa.schema([("author_id", pa.int64()), ("text", pa.string())])

SEGMENTS = pa.schema(
    [("item_id", pa.int64()), ("segment", pa.int32()), ("start_ms", pa.int64()), ("text", pa.string())]
)
"""``segment`` counts from 0 in each room. A segment's text is known 30 seconds after ``start_ms``."""

COMMENTS = pa.schema(
    [
        ("comment_id", pa.int64()),
        ("item_id", pa.int64()),
        ("user_id", pa.int64()),
        ("time_ms", pa.int64()),
        ("likes", pa.int64()),
        ("text", pa.string()),
    ]
)
"""``likes`` is the source's count at the end of the data, the future to whoever asks earlier: what was known at a
request is ``shown_likes`` of the visits, or a count of earlier visits' ``interacted``. ``user_id`` is the writer."""

VISITS = pa.schema(
    [
        ("visit_id", pa.int64()),
        ("user_id", pa.int64()),
        ("item_id", pa.int64()),
        ("request_ms", pa.int64()),
        ("staytime_ms", pa.int64()),
        ("shown", _IDS),
        ("shown_likes", _IDS),
        ("interacted", _IDS),
    ]
)
"""``staytime_ms`` is the time in the comment area, 0 if it was not opened. ``shown``: the comments at the top of the
area at the time of the request, in the order of display, whether it was opened or not; ``shown_likes``: the likes that
each of them had then, or empty where the source does not say. ``interacted``: those that the user liked or answered in
this visit, in any order, known only after it; they need not be in ``shown``. In the file visits are in any order."""

SCHEMAS: dict[str, pa.Schema] = {
    "items": ITEMS,
    "authors": AUTHORS,
    "segments": SEGMENTS,
    "comments": COMMENTS,
    "visits": VISITS,
}

STAYTIME_TRUTH = pa.schema(
    [
        ("visit_id", pa.int64()),
        ("user_id", pa.int64()),
        ("request_ms", pa.int64()),
        ("p_open", pa.float32()),
        ("seconds_if_open", pa.float32()),
        ("p_interact", pa.list_(pa.float32())),
    ]
)
"""The probability that the area is opened, the mean staytime in seconds if it is (so the mean of all is the product),
and for each comment of ``shown`` the probability of an interaction if it is."""

COMMENT_TRUTH = pa.schema([("comment_id", pa.int64()), ("kind", pa.int8()), ("quality", pa.float32())])
"""``kind`` is a position in the description's ``extra["comment_kinds"]``."""

_ACCEPTED: dict[pa.DataType, str] = {
    pa.int8(): "a whole number",
    pa.int32(): "a whole number",
    pa.int64(): "a whole number",
    pa.string(): "a text, empty where there is none",
    _IDS: "a list of whole numbers, empty where there is none",
}
"""What a value of each type is, in words."""

TRUTHS: dict[str, pa.Schema] = {"staytime": STAYTIME_TRUTH, "comments": COMMENT_TRUTH}


def read_texts(path: str | Path, name: str, columns: list[str] | None = None) -> pa.Table:
    """A text table of the dataset at ``path``, a directory or a URL; visits come in order of time, then ``visit_id``.

    Args:
        path: of the dataset.
        name: one of ``SCHEMAS``.
        columns: those to read; all if None.

    Raises:
        UserError: the dataset has no such table, a column is missing or of another type, or a value is null.
    """
    file = storage.join(path, f"{FOLDER}/{name}.parquet")
    wanted = SCHEMAS[name].names if columns is None else columns
    order = [("request_ms", "ascending"), ("visit_id", "ascending")] if name == "visits" else []
    read = list(dict.fromkeys([*wanted, *(column for column, _ in order)]))
    try:
        with pq.ParquetFile(pa.BufferReader(storage.read_bytes(file)) if storage.is_remote(file) else file) as source:
            missing = [column for column in read if column not in source.schema_arrow.names]
            if missing:
                raise UserError(f"{file}: column {missing[0]!r} is missing")
            table = source.read(columns=read)
    except FileNotFoundError:
        raise UserError(
            f"{path}: has no {FOLDER}/{name}.parquet; `limelight data simulate --texts` and `limelight data import "
            "kuaicomt` make datasets with texts"
        ) from None
    except pa.ArrowException as error:
        raise UserError(f"{file}: cannot be read as a table ({error})") from None
    table = _checked(table, SCHEMAS[name], file)
    return (table.sort_by(order) if order else table).select(wanted)


def _checked(table: pa.Table, schema: pa.Schema, file: str | Path) -> pa.Table:
    """The table in the schema's types.

    Raises:
        UserError: a value is null or does not fit its type; names the first row.
    """
    columns = []
    for column in table.column_names:
        values, wanted = table[column], schema.field(column).type
        lists = pa.types.is_list(wanted) and pa.types.is_list(values.type)
        if values.null_count or (lists and pc.list_flatten(values).null_count):
            row = next(
                row for row, value in enumerate(values.to_pylist()) if value is None or (lists and None in value)
            )
            raise UserError(f"{file}: row {row}: {column} is null; it must be {_ACCEPTED[wanted]}")
        try:
            columns.append(values.cast(wanted))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise UserError(
                f"{file}: {column} has values of type {values.type}; each must be {_ACCEPTED[wanted]}"
            ) from None
    return pa.table(columns, table.column_names)


def has_texts(path: str | Path, name: str) -> bool:
    """Whether the dataset at ``path`` has the text table ``name``."""
    try:
        storage.read_bytes(storage.join(path, f"{FOLDER}/{name}.parquet"), size=4)
    except FileNotFoundError:
        return False
    return True


def segment_ids(item_id: np.ndarray, segment: np.ndarray) -> np.ndarray:
    """One id for each segment of a room: ``item_id * SEGMENTS_PER_ITEM + segment``, ``[n] int64``.

    Raises:
        UserError: an id or a segment number is too large for that.
    """
    if len(item_id) and (item_id.max() >= 1 << 47 or segment.max() >= SEGMENTS_PER_ITEM):
        raise UserError(
            f"texts/segments: item {item_id.max()} or segment {segment.max()} is too large; items must be below 2^47 "
            f"and segments below {SEGMENTS_PER_ITEM}"
        )
    return item_id.astype(np.int64) * SEGMENTS_PER_ITEM + segment.astype(np.int64)


def flat_lists(column: pa.ChunkedArray | pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """A column of lists as flat values ``[total] int64`` and offsets ``[n + 1] int64``."""
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    values = pc.list_flatten(column)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return values.to_numpy(zero_copy_only=False).astype(np.int64, copy=False), offsets


def list_column(values: np.ndarray, offsets: np.ndarray) -> pa.ListArray:
    """The reverse of ``flat_lists``."""
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values, pa.int64()))


def pad_lists(column: pa.ChunkedArray | pa.Array, width: int, fill: int = NO_COMMENT) -> np.ndarray:
    """The first ``width`` values of each list, ``[n, width] int64``; ``fill`` where a list has fewer."""
    values, offsets = flat_lists(column)
    place = offsets[:-1, None] + np.arange(width)
    there = place < offsets[1:, None]
    padded = np.full(there.shape, fill, np.int64)
    padded[there] = values[place[there]]
    return padded
