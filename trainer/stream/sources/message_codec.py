"""Codec between events and messages of a topic. Invalid events are returned with a reason and never raise an error.

``json``: one or more events, each a JSON object, on a line of its own or over several lines, or in a JSON array::

    {"user_id": 17, "author_id": 3, "item_id": 90, "domain": "live", "visit_id": 5, "event": "like",
     "time_ms": 1700000000000, "value": 0}

``arrow``: one or more events as an Arrow IPC stream with the columns of ``trainer.data.format.schema.EVENT_COLUMNS``,
and the feature columns if it has features.

============  =====================  =============================================================================
field         json                   meaning
============  =====================  =============================================================================
user_id       integer                required and not negative, like ``author_id``, ``item_id`` and ``visit_id``
domain        "video", "live"        an int8 position in ``schema.DOMAINS`` in Arrow
event         string                 exposure, enter, exit, or one of the job's behaviours
time_ms       integer                milliseconds UTC, from the year 2000 on and not far ahead of the clock
value         number, null or none   float32 in Arrow; watch time in ms of an exit, price of a gift, otherwise 0
side          list, null or none     integers, int32 in Arrow: each in ``[0, rows)`` of its ``DatasetSpec.side``
dense         list, null or none     numbers, float32 in Arrow: one for each ``DatasetSpec.dense``
stat          list, null or none     numbers, float32 in Arrow: counts, laid out as in ``schema.row_columns``
============  =====================  =============================================================================

``side``, ``dense`` and ``stat`` are the features of the visit as of its request, in the order of the job's dataset; an
event has all three or none of them. They belong to the exposure in a candidate domain, or to the enter if the producer
has no exposures. On other events they are ignored, like unknown fields. The events of a message belong to one partition
and are in the order of the log.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.config.stream import MessageFormat
from trainer.data.format.schema import DOMAINS, EVENT_COLUMNS, DatasetSpec, partition_of
from trainer.data.format.times import EARLIEST_MS, milliseconds_of
from trainer.data.format.validation import Columns
from trainer.data.format.visit_events import event_names, event_table
from trainer.data.importers.field_parsers import whole_numbers
from trainer.stream.labels.assembled_rows import ENTER, EVENT_TYPES
from trainer.stream.labels.visit_grouping import in_domains
from trainer.stream.sources.json_events import (
    IDS,
    INTEGERS,
    is_text,
    message_of,
    parse_lines,
    parse_together,
    split_events,
)
from trainer.stream.sources.logged_features import FEATURES, RequestFeatures
from trainer.stream.sources.message_features import FeatureListCodec

_LISTS = pa.schema(
    [("side", pa.list_(pa.int32())), ("dense", pa.list_(pa.float32())), ("stat", pa.list_(pa.float32()))]
)
_NAMED_EVENTS = EVENT_COLUMNS.set(EVENT_COLUMNS.get_field_index("event"), pa.field("event", pa.string()))
# ``side`` is read as int64, so that a value beyond int32 rejects one event and not the whole message.
_READ = pa.schema([*_NAMED_EVENTS, *_LISTS.set(0, pa.field("side", pa.list_(pa.int64())))])
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
_EMPTY = {None: "the message has no value (null)", b"": "the message is empty"}


@dataclass(frozen=True)
class RejectedEvent:
    """Event or message that could not be decoded.

    Attributes:
        message: position of its message in the call.
        inside: number of the event in its message.
        reason: reason as text for a person.
        owner: partition of its user, if the event is in another one; otherwise None.
        user: its user, if ``owner`` is set.
    """

    message: int
    inside: int
    reason: str
    owner: int | None = None
    user: int | None = None


@dataclass(frozen=True)
class DecodedMessages:
    """Decoded events of some messages.

    Attributes:
        events: columns of ``EVENT_TYPES``, each ``[n]``, in the order of the messages.
        message: ``[n]`` int64, position of each event's message in the call.
        inside: ``[n]`` int64, number of each event in its message, with rejected events counted.
        logged: logged features of some of the events.
        sizes: ``[messages]`` int64, number of events in each message, with rejected events counted.
        rejected: rejected events, in order.
    """

    events: Columns
    message: np.ndarray
    inside: np.ndarray
    logged: RequestFeatures
    sizes: np.ndarray
    rejected: list[RejectedEvent]


class MessageCodec:
    """Encodes and decodes messages.

    Args:
        format: format of the messages.
        spec: description of the dataset, which names the behaviours and the features.
        ahead_ms: maximum time of an event ahead of the clock.
    """

    def __init__(self, format: MessageFormat, spec: DatasetSpec, ahead_ms: int) -> None:
        self._format, self._spec, self._ahead_ms = format, spec, ahead_ms
        self._names, self._features = event_names(spec), FeatureListCodec(spec)

    def decode(
        self, values: Sequence[bytes | None], now_ms: int, partition: np.ndarray | None = None, partitions: int = 0
    ) -> DecodedMessages:
        """Decode messages.

        Args:
            values: contents of the messages; None for a message without one.
            now_ms: the current time by the clock.
            partition: ``[messages]`` partition of each message, which is compared with ``schema.partition_of`` of its
                users; None skips this check.
            partitions: number of partitions of the topic.
        """
        present = [value or b"" for value in values]
        parsed = _from_json(present) if self._format == "json" else _from_arrow(present)
        table, message, inside, sizes, rejected = parsed
        rejected = [
            entry if present[entry.message] else replace(entry, reason=_EMPTY[values[entry.message]])
            for entry in rejected
        ]
        events, reasons = self._checked(table, now_ms)
        # Features of other events are ignored, so they cannot be a reason to reject.
        opens = (events["event"] <= ENTER) & in_domains(self._spec, events["domain"], None)
        logged, no_features = self._features.read(table, opens)
        # An invalid field is the more basic reason.
        reasons = no_features | reasons
        owners: dict[int, int] = {}
        if partition is not None:
            owner = partition_of(events["user_id"], partitions)
            for row in np.flatnonzero(owner != partition[message]).tolist():
                # An invalid field is the more basic reason.
                if row not in reasons:
                    owners[row] = int(owner[row])
                    reasons[row] = (
                        f"its user belongs to partition {owner[row]}, not to partition {partition[message[row]]}"
                    )
        rejected += [
            RejectedEvent(
                int(message[row]),
                int(inside[row]),
                reason,
                owners.get(row),
                int(events["user_id"][row]) if row in owners else None,
            )
            for row, reason in reasons.items()
        ]
        if reasons:
            kept = np.ones(len(message), bool)
            kept[list(reasons)] = False
            events, logged = {name: column[kept] for name, column in events.items()}, logged.take(np.flatnonzero(kept))
            message, inside = message[kept], inside[kept]
        rejected.sort(key=lambda bad: (bad.message, bad.inside))
        return DecodedMessages(events, message, inside, logged, sizes, rejected)

    def encode(self, events: Columns, logged: RequestFeatures | None = None) -> list[bytes]:
        """Encode each event as a message, with its ``logged`` features if there are any."""
        if self._format == "json":
            return self._lines(events, logged)
        table = self._table(events, logged)
        return [_stream(table.slice(row, 1)) for row in range(table.num_rows)]

    def encode_together(self, events: Columns, logged: RequestFeatures | None = None) -> bytes:
        """Encode all events as one message."""
        if self._format == "json":
            return b"\n".join(self._lines(events, logged))
        return _stream(self._table(events, logged))

    def _lines(self, events: Columns, logged: RequestFeatures | None) -> list[bytes]:
        """Return the events as JSON lines."""
        template = ", ".join(
            [*(f'"{name}": %d' for name in IDS), '"domain": %s, "event": %s, "time_ms": %d, "value": %r']
        )
        domains, names = [json.dumps(name) for name in DOMAINS], [json.dumps(name) for name in self._names]
        columns = [
            *(events[name].tolist() for name in IDS),
            [domains[code] for code in events["domain"].tolist()],
            [names[code] for code in events["event"].tolist()],
            events["time_ms"].tolist(),
            events["value"].tolist(),
        ]
        # A template is faster than ``json.dumps`` of a dict per event.
        lines = ["{" + template % row + "}" for row in zip(*columns, strict=True)]
        if logged is not None:
            for at, features in zip(logged.at.tolist(), self._features.lines(logged), strict=True):
                lines[at] = f"{lines[at][:-1]}, {features}}}"
        return [line.encode() for line in lines]

    def _table(self, events: Columns, logged: RequestFeatures | None) -> pa.Table:
        """Return the events as an Arrow table."""
        table = event_table(self._spec, events)
        if logged is not None:
            for name, column in self._features.arrays(logged, table.num_rows).items():
                table = table.append_column(_LISTS.field(name), column)
        return table

    def _checked(self, table: pa.Table, now_ms: int) -> tuple[Columns, dict[int, str]]:
        """Return the columns of a table, and the reasons of invalid rows, whose values are meaningless."""
        reasons: dict[int, str] = {}

        def refuse(bad: np.ndarray, reason: str) -> None:
            # A later check is more basic, so its reason replaces an earlier one.
            reasons.update((row, reason) for row in np.flatnonzero(bad).tolist())

        value = table["value"].cast(pa.float64()).fill_null(0.0).to_numpy()
        columns: Columns = {name: table[name].fill_null(0).to_numpy() for name in INTEGERS}
        time_ms = columns["time_ms"]
        refuse(~(np.abs(value) <= _LARGEST_FLOAT32), "value is not a finite float32")
        refuse(
            time_ms > now_ms + self._ahead_ms, f"time_ms is more than {self._ahead_ms / 3.6e6:g} h ahead of the clock"
        )
        refuse(time_ms < EARLIEST_MS, "time_ms is before the year 2000; it must be in milliseconds")
        for name in INTEGERS:
            refuse(columns[name] < 0, f"{name} is negative")
        columns["value"] = np.where(np.abs(value) <= _LARGEST_FLOAT32, value, 0).astype(np.float32)
        for name, known in (("event", self._names), ("domain", DOMAINS)):
            codes = table[name]
            if not pa.types.is_integer(codes.type):
                # Arrow may carry codes, JSON always has names.
                codes = pc.index_in(codes, value_set=pa.array(known))
            code = codes.fill_null(-1).to_numpy()
            outside = (code < 0) | (code >= len(known))
            for row in np.flatnonzero(outside).tolist():
                reasons[row] = f"{name} {table[name][row].as_py()!r:.80} is unknown; known are {', '.join(known)}"
            columns[name] = np.where(outside, 0, code).astype(np.int8)
        for name in (*INTEGERS, "domain", "event"):
            if table[name].null_count:
                refuse(table[name].is_null().to_numpy(), f"{name} is missing")
        return {name: columns[name].astype(dtype, copy=False) for name, dtype in EVENT_TYPES.items()}, reasons


_Parsed = tuple[pa.Table, np.ndarray, np.ndarray, np.ndarray, list[RejectedEvent]]
"""Table of candidate events; ``message``, ``inside`` and ``sizes`` as in :class:`DecodedMessages`; rejected events."""


def _from_json(values: Sequence[bytes]) -> _Parsed:
    """Parse messages of JSON lines into columns of ``json_events.JSON_SCHEMA``."""
    values = [value.removesuffix(b"\n") for value in values]
    sizes = np.array([value.count(b"\n") + 1 for value in values], np.int64)
    table = parse_together(values, int(sizes.sum()))
    if table is not None:
        return table, *_places(sizes, np.ones(len(values), bool)), sizes, []
    # Some line is not plain, so the events are parsed apart as far as necessary.
    text = np.array([is_text(value) for value in values], bool)
    sizes[~text] = 1
    rejected = [RejectedEvent(place, 0, "not UTF-8 text") for place in np.flatnonzero(~text).tolist()]
    events = [split_events(values[place]) for place in np.flatnonzero(text).tolist()]
    sizes[text] = [len(pieces) for pieces in events]
    lines = list(chain.from_iterable(events))
    message, inside = _places(sizes, text)
    table, bad = parse_lines(lines)
    rejected += [RejectedEvent(int(message[row]), int(inside[row]), reason) for row, reason in bad.items()]
    kept = np.ones(len(lines), bool)
    kept[list(bad)] = False
    return table, message[kept], inside[kept], sizes, rejected


def _places(sizes: np.ndarray, whole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the message of every event and its number in it, for the messages where ``whole`` is set."""
    sizes = sizes[whole]
    message = np.repeat(np.flatnonzero(whole), sizes)
    return message, np.arange(len(message)) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _from_arrow(values: Sequence[bytes]) -> _Parsed:
    """Parse IPC streams into one table of events."""
    tables: list[pa.Table] = [_READ.empty_table()]
    rejected: list[RejectedEvent] = []
    sizes = np.ones(len(values), np.int64)
    whole = np.ones(len(values), bool)
    opened: list[pa.Table] = []
    for place, value in enumerate(values):
        try:
            opened.append(_read(value))
        except Exception as error:
            # Broad, because a message may hold anything, and an error would come again at the same offset.
            opened.append(pa.table({}))
            rejected.append(_not_arrow(place, error))
            whole[place] = False
    try:
        # Most messages share a schema, and one conversion of all of them is much faster.
        tables.append(_named(pa.concat_tables([opened[place] for place in np.flatnonzero(whole).tolist()])))
        sizes[whole] = [opened[place].num_rows for place in np.flatnonzero(whole).tolist()]
    except Exception:
        for place in np.flatnonzero(whole).tolist():
            try:
                tables.append(_named(opened[place]))
                sizes[place] = opened[place].num_rows
            except Exception as error:
                rejected.append(_not_arrow(place, error))
                whole[place] = False
    return pa.concat_tables(tables).combine_chunks(), *_places(sizes, whole), sizes, rejected


def _named(table: pa.Table) -> pa.Table:
    """Convert a table to the columns of ``_READ``."""
    table.validate(full=True)
    missing = [name for name in EVENT_COLUMNS.names if name not in table.column_names]
    if missing:
        raise pa.ArrowInvalid(f"it has no column {missing[0]}")
    twice = [name for name in _READ.names if table.column_names.count(name) > 1]
    if twice:
        raise pa.ArrowInvalid(f"it has the column {twice[0]} more than once")
    for name in FEATURES:
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(table.num_rows, _READ.field(name).type))
    for name in INTEGERS:
        column = table[name]
        if pa.types.is_timestamp(column.type) or pa.types.is_floating(column.type):
            exact = milliseconds_of if pa.types.is_timestamp(column.type) else whole_numbers
            table = table.set_column(table.column_names.index(name), name, exact(column))
    return table.select(_READ.names).cast(_READ)


def _read(value: bytes) -> pa.Table:
    """Return the table of an IPC stream of at least one row."""
    with pa.ipc.open_stream(value) as stream:
        table = stream.read_all()
    if not table.num_rows:
        # A message that gives neither an event nor a dead letter would vanish.
        raise pa.ArrowInvalid("it has no events")
    return table


def _not_arrow(place: int, error: Exception) -> RejectedEvent:
    """Return the rejection of a whole message."""
    message = (str(error).splitlines() or [type(error).__name__])[0]
    return RejectedEvent(place, 0, f"not an Arrow stream of events: {message:.120}")


def select_events(format: MessageFormat, value: bytes | None, numbers: Collection[int]) -> bytes | None:
    """Return a message with only some events of a message; the same message if these are all, or if it has none.

    Args:
        format: format of the message.
        value: content of the message; None for a message without one.
        numbers: numbers of the events in the message, as ``RejectedEvent.inside``.
    """
    if not value:
        return value
    if format == "json":
        pieces = split_events(value) if is_text(value) else [value]
        chosen = [piece for number, piece in enumerate(pieces) if number in numbers]
        return value if len(chosen) == len(pieces) else message_of(chosen)
    try:
        table = _read(value)
        _named(table)
        rows = [number for number in range(table.num_rows) if number in numbers]
        return value if len(rows) == table.num_rows else _stream(table.take(rows))
    except Exception:
        # A message that was rejected whole may hold anything.
        return value


def _stream(table: pa.Table) -> bytes:
    """Return a table as an IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()
