"""Attribution of single events (likes, comments, gifts) to visits, for logs that do not record the visit of an event.

The attribution is last touch: an event belongs to the latest visit of its user to its room that began no later than the
event. A gift is therefore counted once, even if its giver came back several times. An event without such a visit is an
orphan. A line that repeats an earlier one in all columns that are read is dropped and counted.
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
from trainer.data.writing.duplicates import DuplicateRule, find_duplicates
from trainer.data.writing.partition_spill import Spill

_EVENTS = pa.schema(
    [
        ("user_id", pa.int64()),
        ("item_id", pa.int64()),
        ("time_ms", pa.int64()),
        ("behaviour", pa.int8()),
        ("value", pa.float32()),
        ("line", pa.int64()),
    ]
)


@dataclass(frozen=True)
class JoinedVisits:
    """Visits of a partition after their events have been attributed.

    Attributes:
        visits: complete visits, as ``schema.visit_schema``.
        repeats: events after the first of their kind in a visit, as ``schema.EVENT_COLUMNS``.
        orphans: number of events without a visit.
        duplicates: number of visits and events that repeat an earlier one exactly, and were dropped before the join.
    """

    visits: pa.Table
    repeats: pa.Table
    orphans: int
    duplicates: int


class EventJoin:
    """Join of visits and events, which are collected on disk and joined partition by partition.

    Args:
        folder: folder of the spilled files; created here.
        spec: specification of the dataset.
    """

    def __init__(self, folder: Path, spec: DatasetSpec) -> None:
        self._spec = spec
        self._schema = visit_schema(spec)
        self._visits = Spill(folder / "visits", self._schema, spec.partitions)
        self._events = Spill(folder / "events", _EVENTS, spec.partitions)

    def visits(self, columns: Columns) -> None:
        """Add visits before attribution, with the columns of ``schema.visit_schema``."""
        self._visits.add(columns)

    def events(self, behaviour: str, columns: Columns) -> None:
        """Add events of one behaviour.

        Args:
            behaviour: name of the behaviour.
            columns: ``user_id``, ``item_id``, ``time_ms``; ``value`` if they have one; and ``line``, a hash of what
                else their lines have, by which two events are told apart.
        """
        n = len(columns["user_id"])
        code = np.full(n, self._spec.behaviours.index(behaviour), np.int8)
        absent: Columns = {"value": np.zeros(n, np.float32), "line": np.zeros(n, np.int64)}
        self._events.add({**absent, **columns, "behaviour": code})

    def join(self, partition: int) -> JoinedVisits:
        """Attribute the events of a partition and return its visits in the order in which they were added.

        To be called once for each partition. An event sets the behaviour and its delay in the visit; it replaces a
        delay that the visit was added with, because the event's time is more exact. A visit ends no earlier than its
        last event.
        """
        self._visits.flush()
        self._events.flush()
        visits, events = self._visits.pop(partition), self._events.pop(partition)
        _, again = find_duplicates(events, ("user_id", "item_id", "time_ms", "behaviour"), list(events))
        # Only one of two equal visits would get their events, and the two would no longer be equal.
        visits, duplicates = DuplicateRule("lines").apply(visits)
        duplicates += len(again)
        events = {name: np.delete(column, again) for name, column in events.items()}
        visit = last_touch(visits, events)
        belongs = visit >= 0
        orphans = len(visit) - int(belongs.sum())
        visit, events = visit[belongs], {name: column[belongs] for name, column in events.items()}
        delay = events["time_ms"] - visits["request_ms"][visit]

        repeated = np.ones(len(visit), bool)
        for code, behaviour in enumerate(self._spec.behaviours):
            rows = np.flatnonzero(events["behaviour"] == code)
            # sorted by visit and delay, so that the first event of each visit is the earliest
            rows = rows[np.lexsort((delay[rows], visit[rows]))]
            with_behaviour, first = np.unique(visit[rows], return_index=True)
            earliest = rows[first]
            visits[f"delay_{behaviour}"][with_behaviour] = delay[earliest]
            if behaviour == "gift":
                visits["value_gift"][with_behaviour] = events["value"][earliest]
            repeated[earliest] = False
        last = np.zeros(len(visits["visit_id"]), np.int64)
        np.maximum.at(last, visit, events["time_ms"])
        visits["exit_ms"] = np.maximum(visits["exit_ms"], last)

        again = np.flatnonzero(repeated)
        repeats = self._event_table(visits, visit, events, again)
        return JoinedVisits(pa.table(visits, schema=self._schema), repeats, orphans, duplicates)

    def _event_table(self, visits: Columns, visit: np.ndarray, events: Columns, rows: np.ndarray) -> pa.Table:
        """Return the events at ``rows`` as ``EVENT_COLUMNS``; ``visit`` has the position of each event's visit."""
        code = events["behaviour"][rows] + np.int8(len(VISIT_EVENTS))
        columns = {
            name: visits[name][visit[rows]] for name in ("user_id", "author_id", "item_id", "domain", "visit_id")
        }
        columns["event"] = pa.DictionaryArray.from_arrays(pa.array(code), pa.array(event_names(self._spec)))
        columns["time_ms"], columns["value"] = events["time_ms"][rows], events["value"][rows]
        return pa.table([columns[name] for name in EVENT_COLUMNS.names], schema=EVENT_COLUMNS)


def no_behaviours(behaviours: tuple[str, ...], n: int) -> Columns:
    """Return the columns ``delay_B`` and ``value_gift`` of ``n`` visits without any behaviour."""
    delays = {f"delay_{behaviour}": np.full(n, -1, np.int32) for behaviour in behaviours}
    return {**delays, "value_gift": np.zeros(n, np.float32)}


def last_touch(visits: Columns, events: Columns) -> np.ndarray:
    """Return the position of the visit that each event belongs to, ``[events] int64``; -1 for none.

    Of visits that began in the same millisecond the first line is taken, because that line is kept when repeated lines
    are dropped. An event more than 2^31 ms after the begin of the visit belongs to none.

    Args:
        visits: ``user_id``, ``item_id``, ``request_ms``.
        events: ``user_id``, ``item_id``, ``time_ms``.
    """
    n, m = len(visits["user_id"]), len(events["user_id"])
    # Visits and events are sorted together; the latest visit before an event is then a running maximum.
    user = np.concatenate([visits["user_id"], events["user_id"]])
    item = np.concatenate([visits["item_id"], events["item_id"]])
    time = np.concatenate([visits["request_ms"], events["time_ms"]])
    # At equal times visits come before events, and the first visit comes last, so that it is the latest for the event.
    rank = np.concatenate([-np.arange(1, n + 1), np.zeros(m, np.int64)])
    order = np.lexsort((rank, time, item, user))
    latest = np.maximum.accumulate(np.where(order < n, np.arange(n + m), -1))
    event_rows = np.flatnonzero(order >= n)
    touched = order[latest[event_rows]]
    event = order[event_rows]
    belongs = (latest[event_rows] >= 0) & (user[touched] == user[event]) & (item[touched] == item[event])
    belongs &= time[event] - time[touched] <= np.iinfo(np.int32).max
    result = np.empty(m, np.int64)
    result[event - n] = np.where(belongs, touched, -1)
    return result


def add_joined(join: EventJoin, builder: DatasetBuilder, partitions: int, progress: Progress | None) -> int:
    """Pass all visits of ``join`` and their repeated events to the builder; return the number of orphans."""
    report = progress or (lambda what, done, total: None)
    orphans = 0
    for partition in range(partitions):
        report("joining events", partition, partitions)
        joined = join.join(partition)
        builder.visits(joined.visits)
        builder.repeats(joined.repeats)
        builder.count_repeated_lines(joined.duplicates)
        orphans += joined.orphans
    report("joining events", partitions, partitions)
    return orphans
