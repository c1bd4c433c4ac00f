"""Visits and the single events (likes, comments, gifts) that belong to them, where the log does not say to which.

An event belongs to the latest visit of its user to its room that began no later than the event: last touch, so that
one gift is counted once however often its giver came back. An event without such a visit belongs to none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from trainer.data.format.schema import EVENT_COLUMNS, VISIT_EVENTS, DatasetSpec, visit_schema
from trainer.data.format.validation import Columns
from trainer.data.format.visit_events import event_names
from trainer.data.writing.builder import DatasetBuilder, Progress
from trainer.data.writing.partition_spill import Spill

_EVENTS = pa.schema(
    [
        ("user_id", pa.int64()),
        ("item_id", pa.int64()),
        ("time_ms", pa.int64()),
        ("behaviour", pa.int8()),
        ("value", pa.float32()),
    ]
)


@dataclass(frozen=True)
class Joined:
    """What became of the visits and events of a partition.

    Attributes:
        visits: complete, as ``schema.visit_schema`` has them.
        repeats: events after the first of their kind in a visit, as ``schema.EVENT_COLUMNS``.
        orphans: number of events that belong to no visit.
    """

    visits: pa.Table
    repeats: pa.Table
    orphans: int


class EventJoin:
    """Collects visits and events of any users on disk, and joins them partition by partition.

    Args:
        folder: for what waits; made here.
        spec: of the dataset.
    """

    def __init__(self, folder: Path, spec: DatasetSpec) -> None:
        self._spec = spec
        self._schema = visit_schema(spec)
        self._visits = Spill(folder / "visits", self._schema, spec.partitions)
        self._events = Spill(folder / "events", _EVENTS, spec.partitions)

    def visits(self, columns: Columns) -> None:
        """Add visits as far as their own lines tell: the columns of ``schema.visit_schema``."""
        self._visits.add(columns)

    def events(self, behaviour: str, columns: Columns) -> None:
        """Add events of one behaviour: ``user_id``, ``item_id``, ``time_ms``, and ``value`` where they have one."""
        n = len(columns["user_id"])
        code = np.full(n, self._spec.behaviours.index(behaviour), np.int8)
        self._events.add({"value": np.zeros(n, np.float32), **columns, "behaviour": code})

    def join(self, partition: int) -> Joined:
        """The visits of a partition, in the order in which they came; to be called once for each.

        An event gives its visit the behaviour and its time. The visit's own line may have told of the behaviour: the
        event's time is then the better one. A visit ends no earlier than its last event.
        """
        self._visits.flush()
        self._events.flush()
        visits, events = self._visits.pop(partition), self._events.pop(partition)
        visit = last_touch(visits, events)
        own = visit >= 0
        orphans = len(visit) - int(own.sum())
        visit, events = visit[own], {name: column[own] for name, column in events.items()}
        delay = events["time_ms"] - visits["request_ms"][visit]

        repeated = np.ones(len(visit), bool)
        for code, behaviour in enumerate(self._spec.behaviours):
            mine = np.flatnonzero(events["behaviour"] == code)
            mine = mine[np.lexsort((delay[mine], visit[mine]))]
            of, first = np.unique(visit[mine], return_index=True)
            earliest = mine[first]
            visits[f"delay_{behaviour}"][of] = delay[earliest]
            if behaviour == "gift":
                visits["value_gift"][of] = events["value"][earliest]
            repeated[earliest] = False
        last = np.zeros(len(visits["visit_id"]), np.int64)
        np.maximum.at(last, visit, events["time_ms"])
        visits["exit_ms"] = np.maximum(visits["exit_ms"], last)

        again = np.flatnonzero(repeated)
        return Joined(pa.table(visits, schema=self._schema), self._event_table(visits, visit, events, again), orphans)

    def _event_table(self, visits: Columns, visit: np.ndarray, events: Columns, which: np.ndarray) -> pa.Table:
        of = visit[which]
        code = events["behaviour"][which] + np.int8(len(VISIT_EVENTS))
        columns = {name: visits[name][of] for name in ("user_id", "author_id", "item_id", "domain", "visit_id")}
        columns["event"] = pa.DictionaryArray.from_arrays(pa.array(code), pa.array(event_names(self._spec)))
        columns["time_ms"], columns["value"] = events["time_ms"][which], events["value"][which]
        return pa.table([columns[name] for name in EVENT_COLUMNS.names], schema=EVENT_COLUMNS)


def no_behaviours(behaviours: tuple[str, ...], n: int) -> Columns:
    """Columns of ``n`` visits in which nothing happened: ``delay_B`` and ``value_gift``."""
    delays = {f"delay_{behaviour}": np.full(n, -1, np.int32) for behaviour in behaviours}
    return {**delays, "value_gift": np.zeros(n, np.float32)}


def last_touch(visits: Columns, events: Columns) -> np.ndarray:
    """Position of the visit that each event belongs to, -1 for none. ``[events] int64``.

    Of visits that began in the same millisecond the one that came first is taken: it is the one that stays when
    repeated lines are dropped. Events more than 2^31 ms after the visit's beginning belong to none.

    Args:
        visits: ``user_id``, ``item_id``, ``request_ms``.
        events: ``user_id``, ``item_id``, ``time_ms``.
    """
    n, m = len(visits["user_id"]), len(events["user_id"])
    user = np.concatenate([visits["user_id"], events["user_id"]])
    item = np.concatenate([visits["item_id"], events["item_id"]])
    time = np.concatenate([visits["request_ms"], events["time_ms"]])
    # Among equal times visits come before events, and of the visits the first one last.
    rank = np.concatenate([-np.arange(1, n + 1), np.zeros(m, np.int64)])
    order = np.lexsort((rank, time, item, user))
    latest = np.maximum.accumulate(np.where(order < n, np.arange(n + m), -1))
    at = np.flatnonzero(order >= n)
    touched = order[latest[at]]
    event = order[at]
    own = (latest[at] >= 0) & (user[touched] == user[event]) & (item[touched] == item[event])
    own &= time[event] - time[touched] <= np.iinfo(np.int32).max
    result = np.empty(m, np.int64)
    result[event - n] = np.where(own, touched, -1)
    return result


def add_joined(join: EventJoin, builder: DatasetBuilder, partitions: int, progress: Progress | None) -> int:
    """Give the builder all visits of ``join`` and their repeated events; returns the number of orphans."""
    report = progress or (lambda what, done, total: None)
    orphans = 0
    for partition in range(partitions):
        report("joining events", partition, partitions)
        joined = join.join(partition)
        builder.visits(joined.visits)
        builder.repeats(joined.repeats)
        orphans += joined.orphans
    report("joining events", partitions, partitions)
    return orphans
