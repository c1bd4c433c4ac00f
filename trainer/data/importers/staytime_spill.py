"""Spill of comment staytimes to disk during an import, and their output with the deduplicated visits."""

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
"""Key of a visit. The first of several lines with the same key is kept, as in the rest of the dataset."""

_SCHEMA = pa.schema([(name, pa.int64()) for name in ("visit_id", *KEY, "staytime_ms")])
_ROWS_AT_ONCE = 1 << 18


class StaytimeSpill:
    """Visits with their staytimes on disk, by partition.

    Args:
        folder: folder of the spilled files; created here.
        partitions: number of partitions of the dataset.
    """

    def __init__(self, folder: Path, partitions: int) -> None:
        self._spill = Spill(folder, _SCHEMA, partitions)
        self.partitions = partitions

    def add(self, columns: Columns) -> None:
        """Add visits: ``visit_id``, ``user_id``, ``item_id``, ``request_ms`` and ``staytime_ms``, int64."""
        self._spill.add(columns)

    def pop(self, partition: int) -> Columns:
        """Remove and return the visits of a partition in the order in which they were added, each once."""
        self._spill.flush()
        visits = self._spill.pop(partition)
        first = first_of_each([visits[name] for name in KEY])
        return {name: column[first] for name, column in visits.items()}


def row_slices(rows: int) -> Iterator[slice]:
    """Yield slices of at most ``_ROWS_AT_ONCE`` rows that cover ``rows`` rows."""
    for first in range(0, rows, _ROWS_AT_ONCE):
        yield slice(first, min(first + _ROWS_AT_ONCE, rows))


def write_staytimes(builder: DatasetBuilder, staytimes: StaytimeSpill) -> None:
    """Pass all visits to a builder as ``text_schema.VISITS``, with empty lists of comments."""
    for partition in range(staytimes.partitions):
        visits = staytimes.pop(partition)
        for rows in row_slices(len(visits["visit_id"])):
            empty = list_column(np.empty(0, np.int64), np.zeros(rows.stop - rows.start + 1, np.int64))
            columns = {name: column[rows] for name, column in visits.items()}
            builder.texts("visits", pa.table({**columns, "shown": empty, "shown_likes": empty, "interacted": empty}))
