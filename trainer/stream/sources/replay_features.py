"""Join of the features of stored training rows to the exposures of a replay.

Rows are stored in order of emission, exposures come in order of their requests. The index of the rows gives the range
of requests in each record, so only the records around the present are in memory: their rows were requested before it
and are emitted after it. Each record is read once, and a replay can start anywhere without reading or sorting first.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trainer.data.format.schema import DatasetSpec, Rows
from trainer.data.format.shards import RowStore
from trainer.data.format.validation import Columns
from trainer.stream.labels.assembled_rows import EXPOSURE
from trainer.stream.labels.visit_grouping import in_domains
from trainer.stream.sources.logged_features import FEATURES, RequestFeatures, empty_features

_KEY = ("visit_id", "user_id", "request_ms")


class ReplayFeatures:
    """Stored features of the exposures of one partition, looked up in about the order of time.

    Args:
        path: dataset, a directory or an fsspec URL.
        spec: description of the dataset.
        partition: number of the partition.
    """

    def __init__(self, path: str | Path, spec: DatasetSpec, partition: int) -> None:
        self._spec, self._partition = spec, partition
        self._store = RowStore(path, spec)
        # A dataset of events only has no rows, and so no index of rows.
        self._index = self._store.records(partition) if spec.rows else None
        self._records: dict[int, Rows] = {}

    def lookup(self, events: Columns) -> RequestFeatures:
        """Return the features that were logged with events.

        An exposure has the features of the row with its user, visit and request time; without such a row it has none.

        Args:
            events: columns of ``EVENT_TYPES``, the next events of the partition. Another order costs more reading.

        Raises:
            UserError: rows cannot be read.
        """
        none = empty_features(self._spec)
        exposure = np.flatnonzero((events["event"] == EXPOSURE) & in_domains(self._spec, events["domain"], None))
        if self._index is None or not len(exposure):
            return none
        wanted = [events[name][exposure] for name in ("visit_id", "user_id", "time_ms")]
        # Records whose range of requests overlaps the portion's.
        first_ms, last_ms = int(wanted[2].min()), int(wanted[2].max())
        needed = np.flatnonzero((self._index.request_min <= last_ms) & (self._index.request_max >= first_ms)).tolist()
        records = [self._read(record) for record in needed]
        found = _first_equal([np.concatenate([none.at, *(rows[name] for rows in records)]) for name in _KEY], wanted)
        known = np.flatnonzero(found >= 0)
        features = self._gathered(records, found[known], none)
        # The next events may have requests of the same last millisecond.
        keep = self._index.request_max >= last_ms
        self._records = {record: self._records[record] for record in needed if keep[record]}
        return features.rows(slice(None), exposure[known])

    def _read(self, record: int) -> Rows:
        """Return a record of rows, from memory if it was read before."""
        if record not in self._records:
            rows = self._store.read(self._partition, record, [*_KEY, *FEATURES])
            assert rows is not None, "the store raises"
            self._records[record] = rows
        return self._records[record]

    def _gathered(self, records: list[Rows], which: np.ndarray, none: RequestFeatures) -> RequestFeatures:
        """Return the features of the rows ``which [n]``, which are positions in the concatenated ``records``."""
        edges = np.cumsum([0, *(len(rows["visit_id"]) for rows in records)])
        record_of_row = np.searchsorted(edges, which, "right") - 1
        out = [np.empty((len(which), column.shape[1]), column.dtype) for column in (none.side, none.dense, none.stat)]
        for record in np.unique(record_of_row).tolist():
            at = np.flatnonzero(record_of_row == record)
            for column, name in zip(out, FEATURES, strict=True):
                column[at] = records[record][name][which[at] - edges[record]]
        return RequestFeatures(which, *out)


def _first_equal(keys: list[np.ndarray], wanted: list[np.ndarray]) -> np.ndarray:
    """Return for each wanted key the position of the first equal key, -1 if there is none.

    Args:
        keys: columns of the keys, ``[n]`` each.
        wanted: the same columns of the wanted keys, ``[m]`` each.

    Returns:
        ``[m]`` int64.
    """
    key_count = len(keys[0])
    both = [np.concatenate(columns) for columns in zip(keys, wanted, strict=True)]
    # The sort is stable, so among equal entries the keys come before the wanted ones.
    order = np.lexsort(both)
    # ``head`` is for each entry the first entry of its run of equal keys.
    new = np.ones(len(order), bool)
    new[1:] = np.any([np.diff(column[order]) != 0 for column in both], axis=0)
    head = order[np.flatnonzero(new)][np.cumsum(new) - 1]
    is_wanted = order >= key_count
    found = np.empty(len(wanted[0]), np.int64)
    found[order[is_wanted] - key_count] = np.where(head[is_wanted] < key_count, head[is_wanted], -1)
    return found
