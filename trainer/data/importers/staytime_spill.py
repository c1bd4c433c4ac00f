"""Times in the comment area, set aside on disk while a log passes through, and written with the visits that stay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from trainer.data.format.sorting import first_of_each
from trainer.data.format.text_schema import list_column
from trainer.data.format.validation import Columns
from trainer.data.writing.builder import DatasetBuilder
from trainer.data.writing.partition_spill import Spill

KEY = ("user_id", "item_id", "request_ms")
"""Of several lines with the same values the first stays, as in the rest of the dataset."""

_SCHEMA = pa.schema([(name, pa.int64()) for name in ("visit_id", *KEY, "staytime_ms")])
_ROWS_AT_ONCE = 1 << 18


class Stays:
    """Collects visits with their staytimes, and gives them back by partition.

    Args:
        folder: for what waits; made here.
        partitions: of the dataset.
    """

    def __init__(self, folder: Path, partitions: int) -> None:
        self._spill = Spill(folder, _SCHEMA, partitions)
        self.partitions = partitions

    def add(self, columns: Columns) -> None:
        """Add visits: ``visit_id``, ``user_id``, ``item_id``, ``request_ms`` and ``staytime_ms``, int64."""
        self._spill.add(columns)

    def pop(self, partition: int) -> Columns:
        """The visits of a partition in the order in which they came, each once."""
        self._spill.flush()
        visits = self._spill.pop(partition)
        first = first_of_each([visits[name] for name in KEY])
        return {name: column[first] for name, column in visits.items()}


def in_parts(rows: int) -> Iterator[slice]:
    """Slices of some hundred thousand rows."""
    for first in range(0, rows, _ROWS_AT_ONCE):
        yield slice(first, min(first + _ROWS_AT_ONCE, rows))


def write_stays(builder: DatasetBuilder, stays: Stays) -> None:
    """Give a builder all visits as ``text_schema.VISITS``, of a log that knows no comments."""
    for partition in range(stays.partitions):
        visits = stays.pop(partition)
        for rows in in_parts(len(visits["visit_id"])):
            none = list_column(np.empty(0, np.int64), np.zeros(rows.stop - rows.start + 1, np.int64))
            some = {name: column[rows] for name, column in visits.items()}
            builder.texts("visits", pa.table({**some, "shown": none, "shown_likes": none, "interacted": none}))
