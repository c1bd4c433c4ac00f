"""An opened dataset: its description, rows and histories."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.data.format import storage
from trainer.data.format.history import Histories
from trainer.data.format.schema import DatasetSpec, Rows
from trainer.data.format.shards import FOLDER, RowStore, index_name
from trainer.data.format.statistics import FrozenStatistics, StatisticsAsOf
from trainer.data.format.time_selection import Selection


@dataclass(frozen=True)
class Dataset:
    """An opened dataset.

    Attributes:
        spec: description of the dataset.
        store: its training rows.
        histories: the histories of its users.
    """

    spec: DatasetSpec
    store: RowStore
    histories: Histories

    @staticmethod
    def open(path: str, on_corrupt: Any = "error") -> Dataset:
        """Open the dataset at ``path``; ``on_corrupt`` is an argument of :class:`RowStore`.

        Raises:
            UserError: there is no dataset, it has another schema version, or its histories cannot be read.
        """
        spec = DatasetSpec.load(path)
        return Dataset(spec, RowStore(path, spec, on_corrupt), Histories(path, spec))


def fingerprint(path: str, spec: DatasetSpec) -> str:
    """Return a hash of a dataset's description and of the index of its rows, which has a checksum of every record."""
    digest = hashlib.blake2b(spec.to_json().encode(), digest_size=16)
    for partition in range(spec.partitions):
        digest.update(storage.read_bytes(storage.join(path, f"{FOLDER}/{index_name(partition)}")))
    return digest.hexdigest()


def freeze_statistics(data: Dataset, until_ms: int) -> FrozenStatistics:
    """Count the statistics over all rows of a dataset that were emitted before ``until_ms``, in one pass."""
    frozen = FrozenStatistics(data.spec)
    for rows in _emitted_before(data, until_ms):
        frozen.add(rows)
    return frozen


def statistics_as_of(data: Dataset, requests: Rows) -> np.ndarray:
    """Return the statistics of requests, each over the rows of a dataset emitted before it, in one pass.

    Args:
        data: dataset whose rows are counted.
        requests: n rows with the columns of the keys and ``request_ms``, in any order.

    Returns:
        ``[n, keys * (1 + behaviours)] float32``.
    """
    statistics = StatisticsAsOf(data.spec, requests)
    for rows in _emitted_before(data, int(requests["request_ms"].max(initial=0))):
        statistics.add(rows)
    return statistics.lookup()


def _emitted_before(data: Dataset, until_ms: int) -> Iterator[Rows]:
    """Yield the rows emitted before ``until_ms``, record by record."""
    known = Selection(emit_until=until_ms)
    for partition in range(data.store.partitions):
        for record in np.flatnonzero(known.touches(data.store.records(partition))).tolist():
            rows = data.store.read(partition, record)
            if rows is not None:
                kept = known.mask(rows)
                yield {name: column[kept] for name, column in rows.items()}
