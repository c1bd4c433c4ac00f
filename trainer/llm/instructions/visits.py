"""Input of instruction samples: a dataset's visits as arrays, and its texts by id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from trainer.data.format.text_schema import flat_lists, read_texts


@dataclass(frozen=True)
class RaggedColumn:
    """Column of ``n`` lists: ``values [total] int64`` and ``offsets [n + 1] int64``."""

    values: np.ndarray
    offsets: np.ndarray

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Lengths of the lists, ``[n] int64``."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class OpenedVisits:
    """Visits with an opened comment area, in order of time; columns as in ``text_schema.VISITS``.

    Attributes:
        known_ms: ``[n] int64``, time at which the user left the comment area, so that its outcome was known.
    """

    visit_id: np.ndarray
    user_id: np.ndarray
    item_id: np.ndarray
    request_ms: np.ndarray
    staytime_ms: np.ndarray
    known_ms: np.ndarray
    shown: RaggedColumn
    shown_likes: RaggedColumn
    interacted: RaggedColumn

    @staticmethod
    def read(path: str | Path) -> OpenedVisits:
        """Read the visits of the dataset at ``path`` whose comment area was opened.

        Raises:
            UserError: the dataset has no visits with staytimes.
        """
        table = read_texts(path, "visits")
        # no task can use a visit without an opened area, and most visits have none
        table = table.filter(pa.compute.greater(table.column("staytime_ms"), 0))
        visit_id, user_id, item_id, request_ms, staytime_ms = (column.to_numpy() for column in table.columns[:5])
        lists = (RaggedColumn(*flat_lists(column)) for column in table.columns[5:])
        return OpenedVisits(visit_id, user_id, item_id, request_ms, staytime_ms, request_ms + staytime_ms, *lists)


class TextLookup:
    """Lookup of columns of a text table by id.

    Args:
        path: path of the dataset.
        name: name of the table.
        key: column of ids.
        columns: columns to look up.
    """

    def __init__(self, path: str | Path, name: str, key: str, columns: list[str]) -> None:
        table = read_texts(path, name, [key, *columns])
        ids = table.column(key).to_numpy()
        self._order = np.argsort(ids, kind="stable")
        self._ids = ids[self._order]
        # the 32-bit offsets of a plain string array allow 2 GB of text only
        self._columns = {
            column: table.column(column).cast(pa.large_string()).combine_chunks()
            if pa.types.is_string(table.schema.field(column).type)
            else table.column(column).to_numpy()
            for column in columns
        }

    def texts(self, ids: np.ndarray, column: str) -> list[str]:
        """Return the texts of ids in a column, each on one line; empty for an unknown id."""
        row = np.minimum(self._ids.searchsorted(ids), max(len(self._ids) - 1, 0))
        if not len(self._ids):
            return [""] * len(ids)
        texts = self._columns[column].take(pa.array(self._order[row])).to_pylist()
        known = self._ids[row] == ids
        return [" ".join(text.split()) if found else "" for text, found in zip(texts, known, strict=True)]

    def numbers(self, ids: np.ndarray, column: str) -> np.ndarray:
        """Return the numbers of ids in a column; every id must be in the table."""
        values: np.ndarray = self._columns[column][self._order[np.searchsorted(self._ids, ids)]]
        return values
