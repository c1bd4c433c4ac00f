"""A dataset, opened: its description, rows and histories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.data.history import Histories
from trainer.data.schema import DatasetSpec
from trainer.data.selection import Selection
from trainer.data.shards import RowStore
from trainer.data.statistics import FrozenStatistics


@dataclass(frozen=True)
class Data:
    """An opened dataset."""

    spec: DatasetSpec
    store: RowStore
    histories: Histories

    @staticmethod
    def open(path: str, on_corrupt: Any = "error") -> Data:
        """Open the dataset at ``path``.

        Raises:
            UserError: none there, another schema version, or an unreadable index.
        """
        spec = DatasetSpec.load(path)
        return Data(spec, RowStore(path, spec, on_corrupt), Histories(path, spec))


def freeze_statistics(data: Data, until_ms: int) -> FrozenStatistics:
    """Statistics over all rows of a dataset that were emitted before ``until_ms``, in one pass."""
    known = Selection(emit_until=until_ms)
    frozen = FrozenStatistics(data.spec)
    for partition in range(data.store.partitions):
        for record in np.flatnonzero(known.touches(data.store.records(partition))).tolist():
            rows = data.store.read(partition, record)
            if rows is not None:
                kept = known.mask(rows)
                frozen.remember({name: column[kept] for name, column in rows.items()})
    return frozen
