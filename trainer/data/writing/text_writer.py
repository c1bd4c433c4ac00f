"""Checks and writes the text tables of a dataset; an error names the table, column, row and value.

Rows count from 0 over all parts of a table. An importer checks what it reads before, and names file and row.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trainer.console.errors import UserError
from trainer.data.format.schema import DOMAINS
from trainer.data.format.text_schema import (
    FOLDER,
    SCHEMAS,
    TRUTHS,
    UNKNOWN_TIME,
    UNKNOWN_USER,
    flat_lists,
    with_known_ms,
)

_KEYS = {"items": "item_id", "authors": "author_id", "comments": "comment_id", "visits": "visit_id"}
"""Table -> id column whose values must be unique in it."""
_LOWEST = {"user_id": UNKNOWN_USER, "time_ms": UNKNOWN_TIME}
"""Column of the comments -> lowest value; all other numbers must be 0 or more."""


class TextWriter:
    """Writes the text tables of a dataset, each in one or more parts. Comments must be added before visits.

    Args:
        dataset: directory in which the dataset is written.
    """

    def __init__(self, dataset: Path) -> None:
        self._dataset = dataset
        self._files: dict[str, pq.ParquetWriter] = {}
        self._keys: dict[str, list[np.ndarray]] = {name: [] for name in _KEYS}
        self._rows = dict.fromkeys(SCHEMAS, 0)
        self._item_of: tuple[np.ndarray, np.ndarray] | None = None

    def add(self, name: str, table: pa.Table) -> None:
        """Add lines to the table ``name`` of ``SCHEMAS``, with the columns in any order.

        Raises:
            UserError: a column is missing or has a bad value, an id comes twice in a part, or a visit names a comment
                that was not added or belongs to another item.
        """
        first_row = self._rows.get(name, 0)
        table = checked(name, table, first_row)
        if name == "comments" and self._item_of is not None:
            raise UserError("texts/comments: comments must be added before the visits that name them")
        if name == "visits":
            self._check_comments(table, first_row)
        elif name in _KEYS:
            self._keys[name].append(table.column(_KEYS[name]).to_numpy())
        self._write(f"{FOLDER}/{name}", table)
        self._rows[name] += table.num_rows

    def add_truth(self, name: str, table: pa.Table) -> None:
        """Add lines to the table ``name`` of ``TRUTHS``."""
        self._write(f"truth/{name}", table.select(TRUTHS[name].names).cast(TRUTHS[name]))

    def close(self) -> None:
        """Close the files."""
        for writer in self._files.values():
            writer.close()

    def finish(self) -> None:
        """Close the files after all parts were added, and check that ids are unique.

        Raises:
            UserError: an id comes twice in a table. Ids of visits are checked only within each part, because there can
                be too many to keep in memory.
        """
        self.close()
        for name, parts in self._keys.items():
            _check_unique(name, np.concatenate([np.empty(0, np.int64), *parts]))

    def _write(self, place: str, table: pa.Table) -> None:
        """Append lines to the file ``place``, a path in the dataset without its ending."""
        if place not in self._files:
            file = self._dataset / f"{place}.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            self._files[place] = pq.ParquetWriter(file, table.schema, compression="zstd")
        self._files[place].write_table(table)

    def _comments(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of the comments in increasing order, and the item of each comment."""
        writer = self._files.get(f"{FOLDER}/comments")
        if writer is None:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        # All comments come before the first visit, so their file is complete and can be read back.
        writer.close()
        stored = pq.read_table(self._dataset / FOLDER / "comments.parquet", columns=["comment_id", "item_id"])
        ids, items = (stored.column(column).to_numpy() for column in ("comment_id", "item_id"))
        order = np.argsort(ids, kind="stable")
        return ids[order], items[order]

    def _check_comments(self, visits: pa.Table, first_row: int) -> None:
        """Check that the comments that visits name exist and belong to the visited item.

        ``first_row`` is the row of the first visit in the table.
        """
        if self._item_of is None:
            self._item_of = self._comments()
        known, item_of = self._item_of
        item = visits.column("item_id").to_numpy()
        for name in ("shown", "interacted"):
            ids, offsets = flat_lists(visits.column(name))
            owner = np.repeat(np.arange(len(item)), np.diff(offsets))
            # Behind the largest id searchsorted gives a position outside the array; the comparison below refuses it.
            at = np.minimum(np.searchsorted(known, ids), max(len(known) - 1, 0))
            there = known[at] == ids if len(known) else np.zeros(len(ids), bool)
            if not there.all():
                first = int(np.argmin(there))
                raise UserError(
                    f"texts/visits: column {name!r} in row {first_row + owner[first]} names comment {ids[first]}, "
                    "which is not in texts/comments; comments must be added before visits"
                )
            other = item_of[at] != item[owner]
            if other.any():
                first = int(np.argmax(other))
                raise UserError(
                    f"texts/visits: column {name!r} in row {first_row + owner[first]} names comment {ids[first]} of "
                    f"item {item_of[at[first]]}; the visit is to item {item[owner[first]]}"
                )


def checked(name: str, table: pa.Table, first_row: int = 0) -> pa.Table:
    """Return ``table`` with the columns and types of ``SCHEMAS[name]``, after a check of its values.

    Segments without ``known_ms`` get it by the rule of ``text_schema.with_known_ms``.

    Args:
        name: name of the text table.
        table: a part of it.
        first_row: row of the first line of the part in the table, for messages.

    Raises:
        UserError: the table is unknown; a column is missing, unknown, has another type or lacks a value; a number
            (a staytime, a count of likes, an id) is negative; a domain is unknown; a segment is known before its end;
            an id comes twice in the table; or ``shown_likes`` has another length than ``shown``. The message gives
            table, column, row and value.
    """
    if name not in SCHEMAS:
        raise UserError(f"{name!r} is not a text table; text tables are {', '.join(SCHEMAS)}")
    what, schema = f"texts/{name}", SCHEMAS[name]
    if name == "segments" and "known_ms" not in table.column_names:
        schema = schema.remove(schema.get_field_index("known_ms"))
    for column in table.column_names:
        if column not in schema.names:
            raise UserError(f"{what}: unknown column {column!r}; known columns are {', '.join(schema.names)}")
    for field in schema:
        if field.name not in table.column_names:
            raise UserError(f"{what}: column {field.name!r} is missing")
    try:
        table = table.select(schema.names).cast(schema)
    except (pa.ArrowException, ValueError) as error:
        raise UserError(f"{what}: a column has a wrong type ({error})") from None
    for field in schema:
        _check_column(what, field, table.column(field.name), first_row)
    if name in _KEYS:
        _check_unique(name, table.column(_KEYS[name]).to_numpy(), first_row)
    if name == "segments":
        table = with_known_ms(table, what, first_row).select(SCHEMAS[name].names)
    if name == "visits":
        shown, likes = (pc.list_value_length(table.column(column)).to_numpy() for column in ("shown", "shown_likes"))
        bad = (likes > 0) & (likes != shown)
        if bad.any():
            row = int(np.argmax(bad))
            raise UserError(
                f"{what}: column 'shown_likes' has {likes[row]} values in row {first_row + row}; it must have "
                f"as many as 'shown', {shown[row]}, or none"
            )
    return table


def _check_column(what: str, field: pa.Field, column: pa.ChunkedArray, first_row: int) -> None:
    """Check that a column has no nulls and that its numbers are in range.

    ``what`` is the table and ``first_row`` the row of the first value in it, for messages.
    """
    if column.null_count:
        row = int(np.argmax(column.is_null().to_numpy()))
        raise UserError(f"{what}: column {field.name!r} has no value in row {first_row + row}")
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
        raise UserError(
            f"{what}: column {field.name!r} is {values[place]} in row {first_row + row}; it must be {accepted}"
        )


def _check_unique(name: str, keys: np.ndarray, first_row: int = 0) -> None:
    """Check that the ids of a table, or of a part of it from ``first_row`` on, are distinct."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(twice):
        place = twice[np.argmin(order[twice + 1])]
        rows = f"rows {first_row + order[place]} and {first_row + order[place + 1]}"
        raise UserError(
            f"texts/{name}: {_KEYS[name]} {ordered[place]} comes twice, in {rows}; each one must have one line"
        )
