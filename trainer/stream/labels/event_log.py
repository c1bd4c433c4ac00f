"""Stored event log of a dataset: reads a partition and validates its events."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from trainer.console.errors import UserError
from trainer.data.format import storage
from trainer.data.format.dataset_files import DatasetFiles
from trainer.data.format.parquet_files import read_table
from trainer.data.format.schema import DOMAINS, EVENT_COLUMNS, DatasetSpec, partition_of
from trainer.data.format.validation import Columns, check_finite, check_ids, columns_of, refuse
from trainer.data.format.visit_events import event_codes, event_names
from trainer.stream.labels.assembled_rows import ENTER, EXIT
from trainer.stream.labels.visit_grouping import simultaneous_rank

AHEAD_MS = 86_400_000
"""Largest time of an event ahead of this machine's clock; clocks differ by less than a day."""

_CODED = EVENT_COLUMNS.set(EVENT_COLUMNS.get_field_index("event"), pa.field("event", pa.int8()))
_ENDS = ("user_id", "visit_id")


class EventLog:
    """Event log of a stored dataset.

    Args:
        path: dataset, a directory or an fsspec URL.

    Attributes:
        spec: description of the dataset.

    Raises:
        UserError: there is no dataset at ``path``.
    """

    def __init__(self, path: str | Path) -> None:
        self.spec = DatasetSpec.load(path)
        self._path, self._files = path, DatasetFiles(path)

    def read(self, partition: int) -> Columns:
        """Read all events of a partition in stored order: columns of ``EVENT_TYPES``.

        Raises:
            UserError: the file cannot be read, or an event is invalid; names file, column, row and value.
        """
        file = storage.join(self._path, f"events/part-{partition:05d}.parquet")
        events = coded_events(self.spec, self._read_table(partition, file), file)
        now_ms = int(time.time() * 1000)
        check_events(self.spec, events, file, now_ms)
        elsewhere = partition_of(events["user_id"], self.spec.partitions) != partition
        refuse(elsewhere, events, "user_id", file, f"of a user of partition {partition}")
        check_order_of_ends(events, file)
        return events

    def _read_table(self, partition: int, file: str) -> pa.Table:
        try:
            return read_table(self._files, f"events/part-{partition:05d}.parquet")
        except FileNotFoundError:
            raise UserError(f"{file}: no such file; the dataset has no event log of this partition") from None


def coded_events(spec: DatasetSpec, table: pa.Table, what: str) -> Columns:
    """Return the columns of a table of events, with each event name as its code.

    Raises:
        UserError: a column is missing or unknown, has a null or another type, or an event's name is unknown.
    """
    if "event" in table.column_names:
        code = event_codes(spec, table.column("event"))
        if (code < 0).any():
            row = int(np.argmax(code < 0))
            name, known = table["event"][row].as_py(), ", ".join(event_names(spec))
            raise UserError(f"{what}: column 'event' is {name!r} in row {row}; known are {known}")
        table = table.set_column(table.column_names.index("event"), "event", pa.array(code))
    return columns_of(table, _CODED, what)


def check_events(spec: DatasetSpec, events: Columns, what: str, now_ms: int) -> None:
    """Check that ids and times are not negative, domains known, values finite, and no event is ahead of the clock.

    Args:
        spec: description of the dataset.
        events: columns of ``EVENT_TYPES``.
        what: file or source of the events, for the message.
        now_ms: the current time; events may be ``AHEAD_MS`` later.

    Raises:
        UserError: an event is invalid; names column, row and value.
    """
    check_ids(events, ("user_id", "author_id", "item_id", "visit_id", "time_ms"), what)
    domain = events["domain"]
    refuse((domain < 0) | (domain >= len(DOMAINS)), events, "domain", what, f"in [0, {len(DOMAINS)})")
    refuse(events["time_ms"] > now_ms + AHEAD_MS, events, "time_ms", what, "no more than a day ahead of the clock")
    check_finite(events, ("value",), what)


def check_order_of_ends(events: Columns, what: str) -> None:
    """Check that no visit has its exit before its first exposure or enter.

    A visit with only one of the two is valid, because a log may begin or end in the middle of a visit.

    Raises:
        UserError: a visit exits before it starts; names the visit and both times.
    """
    # Only these events can violate the order, and sorting few events is fast.
    ends = np.flatnonzero((events["event"] <= ENTER) | (events["event"] == EXIT))
    event = {name: events[name][ends] for name in (*_ENDS, "time_ms", "event")}
    order = np.lexsort((simultaneous_rank(event["event"]), event["time_ms"], event["visit_id"], event["user_id"]))
    event = {name: column[order] for name, column in event.items()}
    # Events are sorted by visit: ``first`` are the positions where a visit's events begin.
    new = np.ones(len(order), bool)
    new[1:] = np.any([np.diff(event[name]) != 0 for name in _ENDS], axis=0)
    first = np.flatnonzero(new)
    opens = np.flatnonzero(event["event"] <= ENTER)
    # ``place`` is the position of the first opening event at or after the first event of each visit.
    place = np.append(opens, len(order))[np.searchsorted(opens, first)]
    starts_in_log = place < np.append(first[1:], len(order))
    # If the first event is an exit and an opening event follows, the visit exits before it starts.
    wrong = np.flatnonzero((event["event"][first] == EXIT) & starts_in_log)
    if len(wrong):
        at, start = first[wrong[0]], place[wrong[0]]
        raise UserError(
            f"{what}: visit {event['visit_id'][at]} of user {event['user_id'][at]} exits at {event['time_ms'][at]} "
            f"before it starts at {event['time_ms'][start]}; an exit must come after its exposure or enter"
        )
