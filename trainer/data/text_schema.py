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

from trainer.data import storage
from trainer.data.schema import DOMAINS
from trainer.errors import UserError

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

_KEYS = {"items": "item_id", "authors": "author_id", "comments": "comment_id", "visits": "visit_id"}
"""Unique in its table."""
_LOWEST = {"user_id": UNKNOWN_USER, "time_ms": UNKNOWN_TIME}
"""Of comments; every other number is 0 or more."""


class TextWriter:
    """Writes the text tables of a dataset, each in one or more parts; comments come before the visits that name them.

    Args:
        folder: the dataset's ``texts``; made here.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._files: dict[str, pq.ParquetWriter] = {}
        self._keys: dict[str, list[np.ndarray]] = {name: [] for name in _KEYS}
        self._item_of: tuple[np.ndarray, np.ndarray] | None = None

    def add(self, name: str, table: pa.Table) -> None:
        """Add lines to the table ``name`` of ``SCHEMAS``, columns in any order.

        Raises:
            UserError: a column is missing or has a bad value, an id comes twice in a part, or a visit names a comment
                that is not there or is of another item.
        """
        table = checked(name, table)
        if name == "comments" and self._item_of is not None:
            raise UserError("texts/comments: comments are added before the visits that name them")
        if name in _KEYS:
            self._keys[name].append(table.column(_KEYS[name]).to_numpy())
        if name == "visits":
            self._check_comments(table)
        if name not in self._files:
            self._files[name] = pq.ParquetWriter(self._folder / f"{name}.parquet", SCHEMAS[name], compression="zstd")
        self._files[name].write_table(table)

    def close(self) -> None:
        """End the files."""
        for writer in self._files.values():
            writer.close()

    def finish(self) -> None:
        """End the files of tables that are complete.

        Raises:
            UserError: an id comes twice in a table.
        """
        self.close()
        for name, parts in self._keys.items():
            _check_unique(name, np.concatenate([np.empty(0, np.int64), *parts]))

    def _comments(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the comments in order, and the item of each."""
        if "comments" not in self._files:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        self._files["comments"].close()
        stored = pq.read_table(self._folder / "comments.parquet", columns=["comment_id", "item_id"])
        ids, items = (stored.column(column).to_numpy() for column in ("comment_id", "item_id"))
        order = np.argsort(ids, kind="stable")
        return ids[order], items[order]

    def _check_comments(self, visits: pa.Table) -> None:
        if self._item_of is None:
            self._item_of = self._comments()
        known, item_of = self._item_of
        item = visits.column("item_id").to_numpy()
        for name in ("shown", "interacted"):
            ids, offsets = flat_lists(visits.column(name))
            owner = np.repeat(np.arange(len(item)), np.diff(offsets))
            at = np.minimum(np.searchsorted(known, ids), max(len(known) - 1, 0))
            there = known[at] == ids if len(known) else np.zeros(len(ids), bool)
            if not there.all():
                first = int(np.argmin(there))
                raise UserError(
                    f"texts/visits: column {name!r} in row {owner[first]} names comment {ids[first]}, "
                    "which is not in texts/comments; comments are added before visits"
                )
            other = item_of[at] != item[owner]
            if other.any():
                first = int(np.argmax(other))
                raise UserError(
                    f"texts/visits: column {name!r} in row {owner[first]} names comment {ids[first]} of item "
                    f"{item_of[at[first]]}; the visit is to item {item[owner[first]]}"
                )


def checked(name: str, table: pa.Table) -> pa.Table:
    """``table`` with the columns and types of ``SCHEMAS[name]``.

    Raises:
        UserError: an unknown table; a column is missing, unknown, has no value or another type; a number is negative
            (a staytime, a count of likes, an id), a domain unknown, an id twice in the table, or ``shown_likes`` of
            another length than ``shown``. Names table, column, row and value.
    """
    if name not in SCHEMAS:
        raise UserError(f"{name!r} is no text table; text tables are {', '.join(SCHEMAS)}")
    what, schema = f"texts/{name}", SCHEMAS[name]
    for column in table.column_names:
        if column not in schema.names:
            raise UserError(f"{what}: unknown column {column!r}; known are {', '.join(schema.names)}")
    for field in schema:
        if field.name not in table.column_names:
            raise UserError(f"{what}: column {field.name!r} is missing")
    try:
        table = table.select(schema.names).cast(schema)
    except (pa.ArrowException, ValueError) as error:
        raise UserError(f"{what}: a column has another type than it should ({error})") from None
    for field in schema:
        _check_column(what, field, table.column(field.name))
    if name in _KEYS:
        _check_unique(name, table.column(_KEYS[name]).to_numpy())
    if name == "visits":
        shown, likes = (pc.list_value_length(table.column(column)).to_numpy() for column in ("shown", "shown_likes"))
        bad = (likes > 0) & (likes != shown)
        if bad.any():
            row = int(np.argmax(bad))
            raise UserError(
                f"{what}: column 'shown_likes' has {likes[row]} values in row {row}; it must have as many as 'shown', "
                f"{shown[row]}, or none"
            )
    return table


def read_texts(path: str | Path, name: str, columns: list[str] | None = None) -> pa.Table:
    """A text table of the dataset at ``path``, a directory or a URL; visits come in order of time, then ``visit_id``.

    Args:
        path: of the dataset.
        name: one of ``SCHEMAS``.
        columns: those to read; all if None.

    Raises:
        UserError: the dataset has no such table, or it is not one of this release.
    """
    file = storage.join(path, f"{FOLDER}/{name}.parquet")
    wanted = SCHEMAS[name].names if columns is None else columns
    order = [("request_ms", "ascending"), ("visit_id", "ascending")] if name == "visits" else []
    read = list(dict.fromkeys([*wanted, *(column for column, _ in order)]))
    try:
        source = pa.BufferReader(storage.read_bytes(file)) if storage.is_remote(file) else file
        table = pq.read_table(source, columns=read)
    except FileNotFoundError:
        raise UserError(
            f"{path}: has no {FOLDER}/{name}.parquet; `limelight data simulate --texts` and `limelight data import "
            "kuaicomt` make datasets with texts"
        ) from None
    except pa.ArrowException as error:
        raise UserError(f"{file}: cannot be read as a table ({error})") from None
    for column in read:
        if column not in table.column_names:
            raise UserError(f"{file}: column {column!r} is missing")
    return (table.sort_by(order) if order else table).select(wanted)


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


def _check_column(what: str, field: pa.Field, column: pa.ChunkedArray) -> None:
    if column.null_count:
        row = int(np.argmax(column.is_null().to_numpy()))
        raise UserError(f"{what}: column {field.name!r} has no value in row {row}")
    if pa.types.is_string(field.type):
        return
    values = flat_lists(column)[0] if pa.types.is_list(field.type) else column.to_numpy()
    lowest = _LOWEST.get(field.name, 0) if what.endswith("comments") else 0
    bad = values < lowest
    if field.name == "domain":
        bad |= values >= len(DOMAINS)
    if bad.any():
        place = int(np.argmax(bad))
        row = place
        if pa.types.is_list(field.type):
            row = int(np.searchsorted(flat_lists(column)[1], place, side="right")) - 1
        accepted = f"in [0, {len(DOMAINS)})" if field.name == "domain" else f"{lowest} or more"
        raise UserError(f"{what}: column {field.name!r} is {values[place]} in row {row}; it must be {accepted}")


def _check_unique(name: str, keys: np.ndarray) -> None:
    ordered = np.sort(keys)
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(twice):
        raise UserError(f"texts/{name}: {_KEYS[name]} {ordered[twice[0]]} comes twice; every {_KEYS[name]} comes once")
