"""Segments of rooms with what is known about them: author, title, time, speech, comments, and references to frames."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.console.errors import UserError
from trainer.data.format.dataset_files import DatasetFiles
from trainer.data.format.parquet_files import read_table
from trainer.data.format.text_schema import SEGMENT_MS, SEGMENTS_PER_ITEM, has_texts, read_texts, segment_ids
from trainer.llm.instructions.visits import TextLookup

FRAMES = "frames"
"""Optional column of the texts of segments: a list of paths or URLs of pictures for each segment."""

_TABLE = "texts/segments.parquet"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class SegmentContext:
    """Content of a segment, each text on one line and cut; an unknown text is empty.

    Attributes:
        item_id: room.
        segment: number of the segment in the room, from 0.
        start_ms: start in milliseconds UTC.
        time: weekday, date and time of day of the start, in the dataset's time zone.
        author: text in which the author describes herself or himself.
        room: title of the room.
        tag: name of the room's category.
        speech: speech of the segment.
        comments: comments that were written during the segment, oldest first.
        frames: paths or URLs of pictures of the segment.
    """

    item_id: int
    segment: int
    start_ms: int
    time: str
    author: str
    room: str
    tag: str
    speech: str
    comments: tuple[str, ...]
    frames: tuple[str, ...]


class SegmentTexts:
    """Segments of a dataset, in order of their ids.

    A segment's context has only texts that are known at its end: speech and comments of its 30 seconds, and what
    authors wrote about themselves and their rooms.

    Args:
        dataset: path of a dataset with ``texts/segments.parquet``; authors, items, comments and frames are optional.
        timezone: IANA name of the time zone of the dataset.
        comments: most comments of a segment; the latest ones are kept.
        characters: most characters of a text; a longer one is cut.

    Attributes:
        ids: ``[n] int64``, increasing, as in ``text_schema.segment_ids``.
        item_id: ``[n] int64``.
        start_ms: ``[n] int64``.
        known_ms: ``[n] int64``, time from which the segment is known.
        filled: ``[n] bool``, segments with a speech or with frames. Others have nothing to ask about.
        cut: number of texts that were cut so far.

    Raises:
        UserError: the dataset has no texts of segments, a table is damaged, or a segment comes twice.
    """

    def __init__(self, dataset: str | Path, timezone: str, *, comments: int, characters: int) -> None:
        self._zone, self._most, self._characters, self.cut = ZoneInfo(timezone), comments, characters, 0
        table = read_texts(dataset, "segments", ["item_id", "segment", "start_ms", "known_ms", "text"])
        item_id, segment, start_ms, known_ms = (column.to_numpy() for column in table.columns[:4])
        if len(table) and min(item_id.min(), segment.min()) < 0:
            raise UserError(f"{dataset}: {_TABLE} has a negative item_id or segment; they count from 0")
        ids = segment_ids(item_id, segment)
        order = np.argsort(ids, kind="stable")
        self.ids, self.item_id = ids[order], item_id[order]
        self.start_ms, self.known_ms = start_ms[order], known_ms[order]
        twice = np.flatnonzero(self.ids[1:] == self.ids[:-1])
        if len(twice):
            item, number = divmod(int(self.ids[twice[0]]), SEGMENTS_PER_ITEM)
            raise UserError(f"{dataset}: {_TABLE} has segment {number} of item {item} twice; each must be there once")
        # the 32-bit offsets of a plain string array allow 2 GB of text only
        speech = table.column("text").cast(pa.large_string()).combine_chunks()
        self._speech = speech.take(pa.array(order))
        self._frames = _frames(dataset, order)
        self.filled = pc.utf8_length(pc.utf8_trim_whitespace(self._speech)).to_numpy(zero_copy_only=False) > 0
        if self._frames is not None:
            lengths = pc.list_value_length(self._frames).to_numpy(zero_copy_only=False)
            self.filled |= lengths > 0
        self._items = TextLookup(dataset, "items", "item_id", ["text", "tag"]) if has_texts(dataset, "items") else None
        self._author_of = _author_of(dataset) if self._items is not None else {}
        authors = has_texts(dataset, "authors")
        self._authors = TextLookup(dataset, "authors", "author_id", ["text"]) if authors else None
        self._comments = _RoomComments.read(dataset, np.unique(item_id)) if has_texts(dataset, "comments") else None

    def context(self, row: int) -> SegmentContext:
        """Return the context of the segment at a position."""
        item, start_ms = int(self.item_id[row]), int(self.start_ms[row])
        author = self._author_of.get(item)
        comments: list[str] = []
        if self._comments is not None and self._most:
            comments = self._comments.during(item, start_ms, start_ms + SEGMENT_MS)[-self._most :]
        return SegmentContext(
            item_id=item,
            segment=int(self.ids[row] % SEGMENTS_PER_ITEM),
            start_ms=start_ms,
            time=self._local_time(start_ms),
            author=self._looked_up(self._authors, author, "text"),
            room=self._looked_up(self._items, item, "text"),
            tag=self._looked_up(self._items, item, "tag"),
            speech=self._line(self._speech[row].as_py()),
            comments=tuple(filter(None, map(self._line, comments))),
            frames=() if self._frames is None else tuple(self._frames[row].as_py()),
        )

    def _looked_up(self, lookup: TextLookup | None, key: int | None, column: str) -> str:
        if lookup is None or key is None:
            return ""
        return self._line(lookup.texts(np.array([key]), column)[0])

    def _line(self, text: str) -> str:
        """Return a text on one line, at most its first ``characters`` characters, and count the cut."""
        text = " ".join(text.split())
        self.cut += len(text) > self._characters
        return text[: self._characters]

    def _local_time(self, start_ms: int) -> str:
        try:
            return (_EPOCH + timedelta(milliseconds=start_ms)).astimezone(self._zone).strftime("%A %Y-%m-%d %H:%M")
        except OverflowError:
            # a source without times may have any number here
            return ""


class _RoomComments:
    """Comments of rooms, in order of room and time."""

    def __init__(self, item_id: np.ndarray, time_ms: np.ndarray, text: pa.Array) -> None:
        order = np.lexsort((time_ms, item_id))
        self._item_id, self._time_ms = item_id[order], time_ms[order]
        self._text = text.take(pa.array(order))

    @staticmethod
    def read(dataset: str | Path, rooms: np.ndarray) -> _RoomComments:
        """Read the comments of a dataset that are under one of the rooms."""
        table = read_texts(dataset, "comments", ["item_id", "time_ms", "text"])
        table = table.filter(pa.array(np.isin(table.column("item_id").to_numpy(), rooms)))
        item_id, time_ms = (table.column(name).to_numpy() for name in ("item_id", "time_ms"))
        return _RoomComments(item_id, time_ms, table.column("text").cast(pa.large_string()).combine_chunks())

    def during(self, item: int, start_ms: int, end_ms: int) -> list[str]:
        """Return the comments of a room from ``start_ms`` to ``end_ms`` (excluded), oldest first."""
        first, last = np.searchsorted(self._item_id, [item, item + 1])
        start, stop = first + np.searchsorted(self._time_ms[first:last], [start_ms, end_ms])
        texts: list[str] = self._text.slice(start, stop - start).to_pylist()
        return texts


def _author_of(dataset: str | Path) -> dict[int, int]:
    """Return the author of every item that is a room."""
    table = read_texts(dataset, "items", ["item_id", "author_id", "domain"])
    item_id, author_id, domain = (column.to_numpy() for column in table.columns)
    rooms = domain != 0
    return dict(zip(item_id[rooms].tolist(), author_id[rooms].tolist(), strict=True))


def _frames(dataset: str | Path, order: np.ndarray) -> pa.Array | None:
    """Return the lists of frames of all segments in an order; None if the table has no such column.

    Raises:
        UserError: the column has another type, or a null.
    """
    table = read_table(DatasetFiles(dataset), _TABLE, ["item_id"], [FRAMES])
    if FRAMES not in table.column_names:
        return None
    column = table.column(FRAMES)
    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not lists or column.null_count or pc.list_flatten(column).null_count:
        raise UserError(f"{dataset}: {_TABLE}: {FRAMES} must be a list of paths or URLs for every row, without nulls")
    try:
        return column.cast(pa.large_list(pa.large_string())).combine_chunks().take(pa.array(order))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise UserError(f"{dataset}: {_TABLE}: {FRAMES} has values of type {kind}; each must be a text") from None
