"""What instruction samples are made of: a dataset's visits as arrays, and its texts by id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from trainer.data.format.text_schema import flat_lists, read_texts


@dataclass(frozen=True)
class Lists:
    """``n`` lists: ``values [total] int64`` and ``offsets [n + 1] int64``."""

    values: np.ndarray
    offsets: np.ndarray

    def __getitem__(self, place: int) -> np.ndarray:
        return self.values[self.offsets[place] : self.offsets[place + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """``[n] int64``."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Visits:
    """Visits in order of time; columns as ``text_schema.VISITS`` has them, times in milliseconds.

    Attributes:
        known_ms: when the comment area was left, and what came of it was known.
    """

    visit_id: np.ndarray
    user_id: np.ndarray
    item_id: np.ndarray
    request_ms: np.ndarray
    staytime_ms: np.ndarray
    known_ms: np.ndarray
    shown: Lists
    shown_likes: Lists
    interacted: Lists

    @staticmethod
    def read(path: str | Path) -> Visits:
        """Those visits of the dataset at ``path`` whose comment area was opened.

        Raises:
            UserError: the dataset has no visits with staytimes.
        """
        table = read_texts(path, "visits")
        # an area that was not opened teaches none of the tasks, and most were not
        table = table.filter(pa.compute.greater(table.column("staytime_ms"), 0))
        visit_id, user_id, item_id, request_ms, staytime_ms = (column.to_numpy() for column in table.columns[:5])
        lists = (Lists(*flat_lists(column)) for column in table.columns[5:])
        return Visits(visit_id, user_id, item_id, request_ms, staytime_ms, request_ms + staytime_ms, *lists)


class Texts:
    """Columns of a text table by id.

    Args:
        path: of the dataset.
        name: of the table.
        key: its column of ids.
        columns: that are looked up.
    """

    def __init__(self, path: str | Path, name: str, key: str, columns: list[str]) -> None:
        table = read_texts(path, name, [key, *columns])
        ids = table.column(key).to_numpy()
        self._order = np.argsort(ids, kind="stable")
        self._ids = ids[self._order]
        # 32-bit offsets end at 2 GB of text
        self._columns = {
            column: table.column(column).cast(pa.large_string()).combine_chunks()
            if pa.types.is_string(table.schema.field(column).type)
            else table.column(column).to_numpy()
            for column in columns
        }

    def of(self, ids: np.ndarray, column: str) -> list[str]:
        """The texts of ids in a column, each on one line; empty where there is none."""
        place = np.minimum(self._ids.searchsorted(ids), max(len(self._ids) - 1, 0))
        if not len(self._ids):
            return [""] * len(ids)
        texts = self._columns[column].take(pa.array(self._order[place])).to_pylist()
        known = self._ids[place] == ids
        return [" ".join(text.split()) if there else "" for text, there in zip(texts, known, strict=True)]

    def numbers(self, ids: np.ndarray, column: str) -> np.ndarray:
        """The numbers of ids, all of which are there."""
        values: np.ndarray = self._columns[column][self._order[np.searchsorted(self._ids, ids)]]
        return values
