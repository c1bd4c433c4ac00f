"""The stored event log of a dataset, read by partition and checked."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.console.errors import UserError
from trainer.data.format import storage
from trainer.data.format.schema import DOMAINS, EVENT_COLUMNS, DatasetSpec, partition_of
from trainer.data.format.validation import Columns, check_finite, check_ids, columns_of, refuse
from trainer.data.format.visit_events import event_codes, event_names
from trainer.stream.labels.assembled_rows import ENTER, EXIT
from trainer.stream.labels.visit_grouping import simultaneous_rank

AHEAD_MS = 86_400_000
"""An event may be ahead of this machine's clock by so much: clocks differ, days do not."""

_CODED = EVENT_COLUMNS.set(EVENT_COLUMNS.get_field_index("event"), pa.field("event", pa.int8()))
_ENDS = ("user_id", "visit_id")


class EventLog:
    """The events of a dataset.

    Args:
        path: dataset, a directory or an fsspec URL.

    Attributes:
        spec: its description.

    Raises:
        UserError: no dataset there.
    """

    def __init__(self, path: str | Path) -> None:
        self.spec = DatasetSpec.load(path)
        self._path = path

    def read(self, partition: int) -> Columns:
        """All events of a partition in stored order: columns of ``rows.EVENT_TYPES``.

        Raises:
            UserError: the file cannot be read, or an event cannot be; names file, column, row and value.
        """
        file = storage.join(self._path, f"events/part-{partition:05d}.parquet")
        events = coded_events(self.spec, _read_table(file), file)
        now_ms = int(time.time() * 1000)
        check_events(self.spec, events, file, now_ms)
        elsewhere = partition_of(events["user_id"], self.spec.partitions) != partition
        refuse(elsewhere, events, "user_id", file, f"of a user of partition {partition}")
        check_order_of_ends(events, file)
        return events


def coded_events(spec: DatasetSpec, table: pa.Table, what: str) -> Columns:
    """Columns of a table of events, the event's name as its code.

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
    """Events that can be: ids and times not negative, known domains, finite values, nothing ahead of the clock.

    Args:
        spec: of the dataset.
        events: columns of ``rows.EVENT_TYPES``.
        what: where they come from, for the message.
        now_ms: the time now; events may be ``AHEAD_MS`` later.

    Raises:
        UserError: an event cannot be; names column, row and value.
    """
    check_ids(events, ("user_id", "author_id", "item_id", "visit_id", "time_ms"), what)
    domain = events["domain"]
    refuse((domain < 0) | (domain >= len(DOMAINS)), events, "domain", what, f"in [0, {len(DOMAINS)})")
    refuse(events["time_ms"] > now_ms + AHEAD_MS, events, "time_ms", what, "no more than a day ahead of the clock")
    check_finite(events, ("value",), what)


def check_order_of_ends(events: Columns, what: str) -> None:
    """No visit has its exit before its first exposure or enter.

    Visits of which the log has only one of the two are not mistaken: a log begins and ends somewhere.

    Raises:
        UserError: one has; names the visit and both times.
    """
    ends = np.flatnonzero((events["event"] <= ENTER) | (events["event"] == EXIT))
    event = {name: events[name][ends] for name in (*_ENDS, "time_ms", "event")}
    order = np.lexsort((simultaneous_rank(event["event"]), event["time_ms"], event["visit_id"], event["user_id"]))
    event = {name: column[order] for name, column in event.items()}
    new = np.ones(len(order), bool)
    new[1:] = np.any([np.diff(event[name]) != 0 for name in _ENDS], axis=0)
    first = np.flatnonzero(new)
    opens = np.flatnonzero(event["event"] <= ENTER)
    place = np.append(opens, len(order))[np.searchsorted(opens, first)]
    begins_in_it = place < np.append(first[1:], len(order))
    wrong = np.flatnonzero((event["event"][first] == EXIT) & begins_in_it)
    if len(wrong):
        at, begin = first[wrong[0]], place[wrong[0]]
        raise UserError(
            f"{what}: visit {event['visit_id'][at]} of user {event['user_id'][at]} exits at {event['time_ms'][at]} "
            f"before it begins at {event['time_ms'][begin]}; an exit must come after its exposure or enter"
        )


def _read_table(file: str) -> pa.Table:
    try:
        if storage.is_remote(file):
            filesystem, inside = storage.open_url(file)
            return pq.read_table(inside, filesystem=filesystem)
        return pq.read_table(Path(file))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; the dataset has no event log of this partition") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file}: not a readable Parquet file ({str(error).splitlines()[0]})") from None
