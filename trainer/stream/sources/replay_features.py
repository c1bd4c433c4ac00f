"""The features of a dataset's training rows, joined to the exposures that a replay brings.

Rows are stored in emission order, exposures come in the order of their requests. The index of the rows says which
requests each record holds, so only the records around the present are in memory: those whose rows were requested before
it and are emitted after it. Each is read once, and nothing has to be read or sorted before a replay can begin anywhere.
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
    """Features of the exposures of one partition, asked for in about the order of time.

    Args:
        path: dataset.
        spec: of it.
        partition: which.
    """

    def __init__(self, path: str | Path, spec: DatasetSpec, partition: int) -> None:
        self._spec, self._partition = spec, partition
        self._store = RowStore(path, spec)
        # A dataset of events alone has no index of rows either.
        self._index = self._store.records(partition) if spec.rows else None
        self._records: dict[int, Rows] = {}

    def of(self, events: Columns) -> RequestFeatures:
        """What was logged with events.

        An exposure carries the features of the row of its user, visit and request time; where the dataset has none, it
        carries nothing.

        Args:
            events: columns of ``EVENT_TYPES``, the next ones of the partition. Other orders cost more reading.

        Raises:
            UserError: rows cannot be read.
        """
        none = empty_features(self._spec)
        exposure = np.flatnonzero((events["event"] == EXPOSURE) & in_domains(self._spec, events["domain"], None))
        if self._index is None or not len(exposure):
            return none
        asked = [events[name][exposure] for name in ("visit_id", "user_id", "time_ms")]
        first_ms, last_ms = int(asked[2].min()), int(asked[2].max())
        wanted = np.flatnonzero((self._index.request_min <= last_ms) & (self._index.request_max >= first_ms)).tolist()
        records = [self._read(record) for record in wanted]
        found = _first_equal([np.concatenate([none.at, *(rows[name] for rows in records)]) for name in _KEY], asked)
        known = np.flatnonzero(found >= 0)
        features = self._gathered(records, found[known], none)
        # Requests of the last millisecond may come once more.
        needed = self._index.request_max >= last_ms
        self._records = {record: self._records[record] for record in wanted if needed[record]}
        return features.rows(slice(None), exposure[known])

    def _read(self, record: int) -> Rows:
        if record not in self._records:
            rows = self._store.read(self._partition, record, [*_KEY, *FEATURES])
            assert rows is not None, "the store raises"
            self._records[record] = rows
        return self._records[record]

    def _gathered(self, records: list[Rows], which: np.ndarray, none: RequestFeatures) -> RequestFeatures:
        """Features of the rows ``which [n]``, counted through all ``records``."""
        edges = np.cumsum([0, *(len(rows["visit_id"]) for rows in records)])
        of_record = np.searchsorted(edges, which, "right") - 1
        out = [np.empty((len(which), column.shape[1]), column.dtype) for column in (none.side, none.dense, none.stat)]
        for record in np.unique(of_record).tolist():
            at = np.flatnonzero(of_record == record)
            for column, name in zip(out, FEATURES, strict=True):
                column[at] = records[record][name][which[at] - edges[record]]
        return RequestFeatures(which, *out)


def _first_equal(keys: list[np.ndarray], asked: list[np.ndarray]) -> np.ndarray:
    """Position of the first of some keys that is equal to each one asked for, -1 where none is.

    Args:
        keys: columns, ``[n]`` each.
        asked: the same columns, ``[m]`` each.

    Returns:
        ``[m]`` int64.
    """
    keys_there = len(keys[0])
    both = [np.concatenate(columns) for columns in zip(keys, asked, strict=True)]
    # The order is stable: among equals the keys stand first.
    order = np.lexsort(both)
    new = np.ones(len(order), bool)
    new[1:] = np.any([np.diff(column[order]) != 0 for column in both], axis=0)
    head = order[np.flatnonzero(new)][np.cumsum(new) - 1]
    of_asked = order >= keys_there
    found = np.empty(len(asked[0]), np.int64)
    found[order[of_asked] - keys_there] = np.where(head[of_asked] < keys_there, head[of_asked], -1)
    return found
