"""Makes training rows from sorted exposures, in one pass through time over all partitions.

Statistics count over all users, so all partitions advance through time together, one slice after the other. A row is
written to the shards of its partition when the pass has reached its emission; until then it waits in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from trainer.data.format.feature_join import FeatureJoin
from trainer.data.format.schema import KINDS, DatasetSpec, Rows
from trainer.data.format.shards import ShardWriter
from trainer.data.format.sorting import stable_order
from trainer.data.format.statistics import Statistics
from trainer.data.format.validation import Columns
from trainer.data.format.visit_events import labels, masks

_END_OF_TIME = np.iinfo(np.int64).max


def assemble(
    spec: DatasetSpec,
    join: FeatureJoin,
    exposures: Sequence[Columns],
    writers: Sequence[ShardWriter],
    progress: Callable[[int, int], None],
    rows_per_slice: int = 1 << 17,
) -> None:
    """Turn the exposures of all partitions into training rows and write them in emission order.

    Args:
        spec: description of the dataset.
        join: features of the tables.
        exposures: columns of each partition in order of ``request_ms``: the ids, ``domain``, ``request_ms``,
            ``emit_ms``, ``bits`` (behaviours that happened) and one column for each ``context`` feature. They can be
            memory-mapped.
        writers: writer of each partition.
        progress: called with the number of rows done and of all rows.
        rows_per_slice: approximate number of rows of a slice, besides those that wait for their emission.
    """
    statistics = Statistics(spec)
    requests = [part["request_ms"] for part in exposures]
    total = sum(len(request) for request in requests)
    done = np.zeros(len(exposures), np.int64)
    waiting: Rows = {}
    # Every slice ends at one time for all partitions: the statistics need all rows in the order of their requests.
    for until in _cuts(requests, rows_per_slice):
        stop = np.array([np.searchsorted(request, until) for request in requests], np.int64)
        rows = _rows(spec, join, exposures, done, stop)
        rows["stat"] = statistics.advance(rows)
        done = stop
        if waiting:
            rows = {name: np.concatenate([waiting[name], column]) for name, column in rows.items()}
        waiting = _emit(rows, until, writers)
        progress(int(done.sum()), total)


def _cuts(requests: Sequence[np.ndarray], rows_per_slice: int) -> list[int]:
    """Return times with about ``rows_per_slice`` requests between them; the last one is later than all rows."""
    # A sample of the requests is enough for slices of about equal size.
    step = max(rows_per_slice // (8 * len(requests)), 1)
    sample = np.sort(np.concatenate([request[step::step] for request in requests]))
    inner = np.unique(sample[rows_per_slice // step :: max(rows_per_slice // step, 1)])
    return [*inner.tolist(), _END_OF_TIME]


def _rows(
    spec: DatasetSpec, join: FeatureJoin, exposures: Sequence[Columns], first: np.ndarray, stop: np.ndarray
) -> Rows:
    """Return rows ``[first, stop)`` of each partition in order of request, with ``partition`` and without ``stat``."""
    partition = np.repeat(np.arange(len(exposures), dtype=np.uint16), stop - first)
    columns = {
        name: np.concatenate([part[name][a:b] for part, a, b in zip(exposures, first, stop, strict=True)])
        for name in exposures[0]
    }
    order = stable_order(columns["request_ms"])
    columns = {name: column[order] for name, column in columns.items()}
    side, dense = join.features(columns)
    return {
        **{name: columns[name] for name in ("visit_id", "user_id", "author_id", "item_id", "domain")},
        "kind": np.full(len(order), KINDS.index("full"), np.uint8),
        "request_ms": columns["request_ms"],
        "emit_ms": columns["emit_ms"],
        "side": side,
        "dense": dense,
        "label": labels(spec, columns["bits"]),
        "mask": masks(spec, columns["domain"]),
        "partition": partition[order],
    }


def _emit(rows: Rows, until: int, writers: Sequence[ShardWriter]) -> Rows:
    """Pass the rows with ``emit_ms < until`` to the writers in emission order, and return the others."""
    ready = rows["emit_ms"] < until
    now = np.flatnonzero(ready)
    now = now[stable_order(rows["emit_ms"][now])]
    # For 16-bit keys numpy's stable sort is a radix sort, much faster than a comparison sort.
    now = now[np.argsort(rows["partition"][now], kind="stable")]
    ends = np.cumsum(np.bincount(rows["partition"][now], minlength=len(writers)))
    ordered = {name: column[now] for name, column in rows.items() if name != "partition"}
    for writer, first, stop in zip(writers, (0, *ends[:-1]), ends, strict=True):
        if stop > first:
            writer.append({name: column[first:stop] for name, column in ordered.items()})
    later = np.flatnonzero(~ready)
    return {name: column[later] for name, column in rows.items()}
