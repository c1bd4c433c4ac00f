"""Segments of a dataset's rooms: room, author, start, and the time from which each segment is known.

A table of segment vectors has one of two kinds of ids, and so have its segments:

* row numbers of ``segments.parquet`` (the simulated world, KuaiLive-M3), which has ``item_id`` and ``known_ms``;
* ids of ``text_schema.segment_ids`` (``limelight embed`` with the kind ``segments``), whose rooms and times are in
  ``texts/segments.parquet``. Without a column ``known_ms``, a segment is known at its end.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from trainer.console.errors import UserError
from trainer.data.format import storage
from trainer.data.format.content_vectors import ContentVectors, Origin
from trainer.data.format.dataset_files import DatasetFiles
from trainer.data.format.parquet_files import read_table, table_footer
from trainer.data.format.text_schema import SEGMENT_MS, read_texts, segment_ids, with_known_ms

SEGMENTS = "segments.parquet"
TEXT_SEGMENTS = "texts/segments.parquet"
TEXT_ITEMS = "texts/items.parquet"
UNKNOWN_AUTHOR = -1


class UnknownRooms(UserError):
    """A dataset with segments has no table of their rooms, so the authors of the segments are not known."""


@dataclass(frozen=True)
class DatasetSegments:
    """All segments of a dataset, in ascending order of their ids.

    Attributes:
        source: path of the table that they come from, for messages.
        ids: ``[n] int64``, id of the segment's vector.
        item_id: ``[n] int64``, room.
        author_id: ``[n] int64``, author of the room; ``UNKNOWN_AUTHOR`` if the dataset does not have the room.
        start_ms: ``[n] int64``. A table without starts has segments that are known at their end, ``SEGMENT_MS`` after
            their start.
        known_ms: ``[n] int64``, time from which the segment is known.
    """

    source: str
    ids: np.ndarray
    item_id: np.ndarray
    author_id: np.ndarray
    start_ms: np.ndarray
    known_ms: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @staticmethod
    def read(dataset: str, embedded: bool) -> DatasetSegments:
        """Read the segments of a dataset.

        Args:
            dataset: path or URL.
            embedded: the ids are those of ``text_schema.segment_ids``, not row numbers of ``segments.parquet``.

        Raises:
            UnknownRooms: there is no table of the rooms.
            UserError: a table is missing or damaged, has no times of its segments, or has a segment twice.
        """
        files = DatasetFiles(dataset)
        ids, item_id, start_ms, known_ms = _text_segments(files) if embedded else _segments(files)
        source = storage.join(dataset, TEXT_SEGMENTS if embedded else SEGMENTS)
        return DatasetSegments(source, ids, item_id, _authors(files, item_id), start_ms, known_ms)

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        """Return the position of each wanted id, ``[m] int64``; -1 if there is no such segment."""
        return _rows_of(self.ids, ids)

    def hash(self, rows: np.ndarray) -> str:
        """Return a hash of ids, rooms, authors and times of the segments at some positions."""
        return segments_hash(
            self.ids[rows], self.item_id[rows], self.author_id[rows], self.start_ms[rows], self.known_ms[rows]
        )

    def check_table(self, table: ContentVectors) -> None:
        """Check that a table of vectors was made from these segments, if it has their hash.

        Args:
            table: has ids of these segments only.

        Raises:
            UserError: it was made from others with the same ids.
        """
        if table.segments and table.segments != self.hash(self.rows_of(table.ids)):
            raise UserError(
                f"{table.path}: its vectors were made from other segments than those of {self.source}, with other "
                "rooms, authors or times; use vectors that were made from this dataset"
            )


def segments_hash(
    ids: np.ndarray, item_id: np.ndarray, author_id: np.ndarray, start_ms: np.ndarray, known_ms: np.ndarray
) -> str:
    """Return a hash of segments, ``[n]`` whole numbers each."""
    digest = hashlib.blake2b(digest_size=16)
    for column in (ids, item_id, author_id, start_ms, known_ms):
        digest.update(column.astype(np.int64).tobytes())
    return digest.hexdigest()


def has_text_ids(origin: Origin) -> bool:
    """True if segment vectors of an origin have the ids of ``text_schema.segment_ids``, not row numbers."""
    return "segments" in origin.template


def _segments(files: DatasetFiles) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return row numbers, rooms, starts and times of ``segments.parquet``, ``[n] int64`` each."""
    place = storage.join(files.path, SEGMENTS)
    try:
        if "known_ms" not in table_footer(files, SEGMENTS)[0].names:
            raise UserError(
                f"{place}: has no known_ms, the time from which a segment is known; datasets of `limelight data "
                "simulate --segment-vectors` and `limelight data import kuailive-m3` have it"
            )
        table = read_table(files, SEGMENTS, ["item_id", "known_ms"], ["start_ms"])
    except FileNotFoundError:
        raise UserError(
            f"{place}: no such file, so the rooms of the vectors are not known; `limelight data simulate "
            "--segment-vectors` and `limelight data import kuailive-m3` make it"
        ) from None
    columns = {name: _whole_numbers(table, name, place) for name in table.column_names}
    if "start_ms" in columns:
        with_known_ms(pa.table(columns), place)
    item_id, known_ms = columns["item_id"], columns["known_ms"]
    if len(known_ms) and known_ms.min() < 0:
        raise UserError(f"{place}: known_ms is {known_ms.min()}; 0 or more is accepted, milliseconds since 1970")
    start_ms = columns["start_ms"] if "start_ms" in columns else known_ms - SEGMENT_MS
    return np.arange(len(item_id)), item_id, start_ms, known_ms


def _whole_numbers(table: pa.Table, name: str, place: str) -> np.ndarray:
    """Return a column ``[n] int64``.

    Raises:
        UserError: it has empty values or other types.
    """
    column = table[name]
    if column.null_count:
        raise UserError(f"{place}: column {name!r} has {column.null_count:,} empty values; it must have none")
    if not pa.types.is_integer(column.type):
        raise UserError(f"{place}: column {name!r} is of the type {column.type}; whole numbers are accepted")
    return column.to_numpy().astype(np.int64)


def _text_segments(files: DatasetFiles) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return ids, rooms, starts and times of ``texts/segments.parquet``, ``[n] int64`` each, ordered by the ids."""
    table = read_texts(files.path, "segments", ["item_id", "segment", "start_ms", "known_ms"])
    item_id, start_ms, known_ms = (table[name].to_numpy() for name in ("item_id", "start_ms", "known_ms"))
    ids = segment_ids(item_id, table["segment"].to_numpy())
    order = np.argsort(ids, kind="stable")
    twice = np.flatnonzero(ids[order][1:] == ids[order][:-1])
    if len(twice):
        row = order[twice[0]]
        raise UserError(
            f"{storage.join(files.path, TEXT_SEGMENTS)}: has segment {table['segment'][row]} of item {item_id[row]} "
            "twice; each must be there once"
        )
    return ids[order], item_id[order], start_ms[order], known_ms[order]


def _authors(files: DatasetFiles, item_id: np.ndarray) -> np.ndarray:
    """Return the author of each room ``[n] int64``; ``UNKNOWN_AUTHOR`` if the dataset does not have the room."""
    for name in ("items.parquet", TEXT_ITEMS):
        try:
            table = read_table(files, name, ["item_id", "author_id"])
        except FileNotFoundError:
            continue
        # An item without an author is as unknown as an item that is not there.
        table = table.set_column(1, "author_id", table["author_id"].fill_null(UNKNOWN_AUTHOR))
        items, authors = (
            _whole_numbers(table, column, storage.join(files.path, name)) for column in table.column_names
        )
        order = np.argsort(items, kind="stable")
        row = _rows_of(items[order], item_id)
        return np.where(row >= 0, authors[order][row], UNKNOWN_AUTHOR).astype(np.int64)
    raise UnknownRooms(
        f"{files.path}: has neither items.parquet nor {TEXT_ITEMS}, so the authors of the rooms are not known"
    )


def _rows_of(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the position of each wanted id in ``ids``, which is sorted; -1 if it is not there."""
    if not len(ids):
        return np.full(len(wanted), -1)
    row = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
    return np.where(ids[row] == wanted, row, -1)
