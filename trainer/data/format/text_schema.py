"""Schema of a dataset's texts: of videos, rooms, authors and comments, and the time that users stay in the comments.

The texts lie in a folder of the dataset. Each table is one Parquet file, and each is optional::

    texts/items.parquet       text and length of an item
    texts/authors.parquet     text in which authors describe themselves
    texts/segments.parquet    speech in 30 seconds of a room
    texts/comments.parquet    comments under videos
    texts/visits.parquet      one line per impression of a video: comments shown, staytime, comments interacted with
    truth/staytime.parquet    simulation only: true distribution of the staytime; training never reads it
    truth/comments.parquet    simulation only: true kind and quality of a comment; training never reads it
    truth/segments.parquet    simulation only: true distribution of the next topic; training never reads it
    truth/segment_vectors.parquet    simulation only: parameters of the segment vectors; training never reads it
    truth/factor_weights.parquet     simulation only: weights of the true factors; training never reads it

Times are integer milliseconds UTC, ids are int64 and not negative, texts are UTF-8. An empty text means that there is
none. A video can have any number of comments, also none. Lists of comments have as many entries as there are comments;
code that needs a fixed number pads them (``pad_lists``) and masks the rest.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.console.errors import UserError
from trainer.data.format import storage
from trainer.data.format.dataset_files import DatasetFiles
from trainer.data.format.parquet_files import read_table

FOLDER = "texts"

UNKNOWN_USER = -1
"""``user_id`` of a comment whose author is not in the source."""

UNKNOWN_TIME = -1
"""``time_ms`` of a comment whose time is not in the source; such a comment counts as present from the beginning."""

NO_COMMENT = -1
"""Padding of lists of comments."""

SEGMENTS_PER_ITEM = 1 << 16
"""Largest number of segments of a room, 22 days of 30 seconds each; see ``segment_ids``."""

SEGMENT_MS = 30_000
"""Length of a segment of a room."""

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
"""Texts of items. ``duration_ms`` is the length of a video, or 0 if it is not known, which is so for a room before it
ends; ``tag`` is the name of a category."""

AUTHORS = pa.schema([("author_id", pa.int64()), ("text", pa.string())])
"""Texts in which authors describe themselves."""

SEGMENTS = pa.schema(
    [
        ("item_id", pa.int64()),
        ("segment", pa.int32()),
        ("start_ms", pa.int64()),
        ("known_ms", pa.int64()),
        ("text", pa.string()),
    ]
)
"""Speech of a room. ``segment`` counts from 0 in each room. ``known_ms`` is the time from which the text is known: the
end of the segment plus the time of its processing. A table without this column is accepted; see ``with_known_ms``."""

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
"""Comments. ``user_id`` is the user who wrote the comment. ``likes`` is the count of the source at the end of the data,
so for any earlier request it is information from the future. The count known at a request is ``shown_likes`` of the
visits, or the number of earlier visits with the comment in ``interacted``."""

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
"""Impressions of videos, in any order in the file.

``staytime_ms`` is the time in the comment area, 0 if the area was not opened. ``shown`` lists the comments at the top
of the area at the time of the request, in the order of display, also if the area was not opened. ``shown_likes`` lists
the likes that each of them had then; it is empty if the source does not give them. ``interacted`` lists, in any order,
the comments that the user liked or answered in this visit; it is known only after the visit, and its comments need not
be in ``shown``."""

SCHEMAS: dict[str, pa.Schema] = {
    "items": ITEMS,
    "authors": AUTHORS,
    "segments": SEGMENTS,
    "comments": COMMENTS,
    "visits": VISITS,
}
"""Text tables by name, and their columns."""

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
"""True staytime of a simulated visit: the probability that the comment area is opened, the mean staytime in seconds if
it is opened (so the mean over all visits is the product), and for each comment of ``shown`` the probability of an
interaction if the area is opened."""

COMMENT_TRUTH = pa.schema([("comment_id", pa.int64()), ("kind", pa.int8()), ("quality", pa.float32())])
"""True kind and quality of a simulated comment. ``kind`` is a position in ``extra["comment_kinds"]`` of the dataset's
description."""

SEGMENT_TRUTH = pa.schema([("item_id", pa.int64()), ("segment", pa.int32()), ("p_next", pa.list_(pa.float32()))])
"""True distribution of the topic of the next segment of the room, if the room goes on, given all segments up to this
one. ``p_next`` has one probability for each of ``extra["topics"]`` of the dataset's description. The lines are in the
order of ``segments.parquet``."""

SEGMENT_VECTOR_TRUTH = pa.schema(
    [("part", pa.string()), ("id", pa.int64()), ("time_ms", pa.int64()), ("vector", pa.list_(pa.float32()))]
)
"""Parameters of the simulated segment vectors, by the values of ``part``.

* ``topic``: mean of the topic ``id``, a position in ``extra["topics"]``.
* ``author``: style and drift of the author ``id`` at ``time_ms``; linear in the ``start_ms`` of a segment between them.
* ``noise``: one line, the standard deviation of the normal noise in each direction.

A vector is the sum of its topic, its author at its start, and noise. ``time_ms`` is 0 where there is no time."""

FACTOR_WEIGHTS = pa.schema(
    [("context", pa.int8()), ("behaviour", pa.string()), ("factor", pa.string()), ("weight", pa.float32())]
)
"""Weights of the factors of a simulated world; a weight that is missing is 0. ``context`` is 0 for a video, and one
plus a position in ``extra["categories"]`` of the dataset's description for a room."""

_ACCEPTED: dict[pa.DataType, str] = {
    pa.int8(): "a whole number",
    pa.int32(): "a whole number",
    pa.int64(): "a whole number",
    pa.string(): "a text, empty where there is none",
    _IDS: "a list of whole numbers, empty where there is none",
}
"""Words for the values that a column of each type accepts."""

TRUTHS: dict[str, pa.Schema] = {
    "staytime": STAYTIME_TRUTH,
    "comments": COMMENT_TRUTH,
    "segments": SEGMENT_TRUTH,
    "segment_vectors": SEGMENT_VECTOR_TRUTH,
    "factor_weights": FACTOR_WEIGHTS,
}
"""Tables of true parameters by name, and their columns; simulated datasets have them."""


def read_texts(path: str | Path, name: str, columns: list[str] | None = None) -> pa.Table:
    """Read a text table of a dataset. Visits are returned in order of time, then of ``visit_id``.

    Args:
        path: dataset, a directory or an fsspec URL.
        name: one of ``SCHEMAS``.
        columns: columns to read; None reads all.

    Raises:
        UserError: the dataset has no such table, a column is missing or of another type, or a value is null.
    """
    file = storage.join(path, f"{FOLDER}/{name}.parquet")
    wanted = SCHEMAS[name].names if columns is None else columns
    order = [("request_ms", "ascending"), ("visit_id", "ascending")] if name == "visits" else []
    # Datasets of earlier versions do not have the time from which a segment is known; its rule needs the start.
    optional = ["known_ms"] if name == "segments" and "known_ms" in wanted else []
    needed = [*wanted, *(column for column, _ in order), *(["start_ms"] if optional else [])]
    read = [column for column in dict.fromkeys(needed) if column not in optional]
    try:
        # Only the columns that are asked for are checked: other columns may be added later or by other tools.
        table = read_table(DatasetFiles(path), f"{FOLDER}/{name}.parquet", read, optional)
    except FileNotFoundError:
        raise UserError(
            f"{path}: has no {FOLDER}/{name}.parquet; `limelight data simulate --texts` and `limelight data import "
            "kuaicomt` make datasets with texts"
        ) from None
    table = _checked(table, SCHEMAS[name], file)
    if optional:
        table = with_known_ms(table, str(file))
    return (table.sort_by(order) if order else table).select(wanted)


def _checked(table: pa.Table, schema: pa.Schema, file: str | Path) -> pa.Table:
    """Return the table with the types of the schema.

    Raises:
        UserError: a value is null or does not fit its type; the message gives the first such row.
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


def with_known_ms(segments: pa.Table, what: str = "segments", first_row: int = 0) -> pa.Table:
    """Return a table of segments with the column ``known_ms``, the time from which a segment is known.

    This is the only place of the rule: a segment is never known before its end, ``SEGMENT_MS`` after its ``start_ms``.
    Where the table has no ``known_ms``, as in a dataset of an earlier version, it is known at its end. Every use of a
    segment at a time ``t`` must have ``known_ms <= t``.

    Args:
        segments: table with the column ``start_ms``, ``int64``.
        what: name of the table for messages.
        first_row: number of its first row, for messages.

    Raises:
        UserError: a segment is known before its end; names the row.
    """
    end_ms = pc.add(segments.column("start_ms"), SEGMENT_MS)
    if "known_ms" not in segments.column_names:
        return segments.append_column("known_ms", end_ms)
    known_ms = segments.column("known_ms")
    early = pc.less(known_ms, end_ms).to_numpy()
    if early.any():
        row = int(np.argmax(early))
        raise UserError(
            f"{what}: row {first_row + row}: known_ms is {known_ms[row]}, before the end of the segment; it must be "
            f"start_ms + {SEGMENT_MS} or more, here {end_ms[row]}"
        )
    return segments


def has_texts(path: str | Path, name: str) -> bool:
    """True if the dataset at ``path`` has the text table ``name``."""
    try:
        storage.read_bytes(storage.join(path, f"{FOLDER}/{name}.parquet"), size=4)
    except FileNotFoundError:
        return False
    return True


def segment_ids(item_id: np.ndarray, segment: np.ndarray) -> np.ndarray:
    """Return one id for each segment of a room: ``item_id * SEGMENTS_PER_ITEM + segment``, ``[n] int64``.

    Raises:
        UserError: an item id is 2^47 or more, a segment number is ``SEGMENTS_PER_ITEM`` or more, or one is negative.
    """
    if len(item_id) and min(item_id.min(), segment.min()) < 0:
        raise UserError(
            f"texts/segments: item {item_id.min()} or segment {segment.min()} is negative; both must be 0 or more"
        )
    if len(item_id) and (item_id.max() >= 1 << 47 or segment.max() >= SEGMENTS_PER_ITEM):
        raise UserError(
            f"texts/segments: item {item_id.max()} or segment {segment.max()} is too large; items must be below 2^47 "
            f"and segments below {SEGMENTS_PER_ITEM}"
        )
    return item_id.astype(np.int64) * SEGMENTS_PER_ITEM + segment.astype(np.int64)


def flat_lists(column: pa.ChunkedArray | pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return a column of lists as flat values ``[total] int64`` and offsets ``[n + 1] int64``."""
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    values = pc.list_flatten(column)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return values.to_numpy(zero_copy_only=False).astype(np.int64, copy=False), offsets


def list_column(values: np.ndarray, offsets: np.ndarray) -> pa.ListArray:
    """Return a column of lists from flat values and offsets; the inverse of ``flat_lists``."""
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values, pa.int64()))


def pad_lists(column: pa.ChunkedArray | pa.Array, width: int, fill: int = NO_COMMENT) -> np.ndarray:
    """Return the first ``width`` values of each list, ``[n, width] int64``, padded with ``fill``."""
    values, offsets = flat_lists(column)
    place = offsets[:-1, None] + np.arange(width)
    there = place < offsets[1:, None]
    padded = np.full(there.shape, fill, np.int64)
    padded[there] = values[place[there]]
    return padded
