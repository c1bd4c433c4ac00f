"""Events as messages of a topic, and back: what is no event is told apart with its reason, and never an error.

``json``: one event or several, each a JSON object on a line of its own (a message of one event is one object)::

    {"user_id": 17, "author_id": 3, "item_id": 90, "domain": "live", "visit_id": 5, "event": "like",
     "time_ms": 1700000000000, "value": 0}

``arrow``: one event or several as an Arrow IPC stream with the columns of ``trainer.data.schema.EVENT_COLUMNS``.

============  =====================  =============================================================================
field         json                   meaning
============  =====================  =============================================================================
user_id       integer                0 or more, as ``author_id``, ``item_id`` and ``visit_id``, which are needed too
domain        "video", "live"        an int8 position in ``schema.DOMAINS`` in Arrow
event         string                 exposure, enter, exit, or one of the job's behaviours
time_ms       integer                milliseconds UTC; not negative, not far ahead of the clock
value         number, null or none   float32 in Arrow; milliseconds watched of an exit, price of a gift, else 0
============  =====================  =============================================================================

Other fields are passed over. Events of one message belong to one partition and come in the order of the log.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as paj

from trainer.data.checks import Columns
from trainer.data.schema import DOMAINS, EVENT_COLUMNS, VISIT_EVENTS, partition_of
from trainer.stream.config import MessageFormat
from trainer.stream.rows import EVENT_TYPES

_IDS = ("user_id", "author_id", "item_id", "visit_id")
_INTEGERS = (*_IDS, "time_ms")
# The value is read in 64 bits and rounded once, whichever parser reads it.
_JSON_SCHEMA = pa.schema(
    [(name, pa.int64()) for name in _INTEGERS]
    + [("domain", pa.string()), ("event", pa.string()), ("value", pa.float64())]
)
_PARSE = paj.ParseOptions(explicit_schema=_JSON_SCHEMA, unexpected_field_behavior="ignore")
_NAMED_EVENTS = EVENT_COLUMNS.set(EVENT_COLUMNS.get_field_index("event"), pa.field("event", pa.string()))
_NOT_ARROW = (pa.ArrowException, OSError, ValueError)
_FEW = 32
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Rejected:
    """What is no event.

    Attributes:
        message: place of its message among those given.
        inside: which event of the message.
        reason: for a person.
        content: a message of the same format with this event alone, or with what else it is.
    """

    message: int
    inside: int
    reason: str
    content: bytes


@dataclass(frozen=True)
class Decoded:
    """Events of some messages.

    Attributes:
        events: columns of ``EVENT_TYPES``, each ``[n]``, in the order of the messages.
        message: ``[n]`` int64, place of each event's message.
        inside: ``[n]`` int64, which event of the message it is, the rejected ones counted too.
        sizes: ``[messages]`` int64, events of each message, rejected ones too.
        rejected: the others, in order.
    """

    events: Columns
    message: np.ndarray
    inside: np.ndarray
    sizes: np.ndarray
    rejected: list[Rejected]


class Codec:
    """Reads and writes messages.

    Args:
        format: of the messages.
        behaviours: event names beside those of every visit, in label order.
        ahead_ms: how far an event may be ahead of the clock.
    """

    def __init__(self, format: MessageFormat, behaviours: Sequence[str], ahead_ms: int) -> None:
        self._format, self._names, self._ahead_ms = format, (*VISIT_EVENTS, *behaviours), ahead_ms

    def decode(
        self, values: Sequence[bytes], now_ms: int, partition: np.ndarray | None = None, partitions: int = 0
    ) -> Decoded:
        """The events of messages.

        Args:
            values: of the messages.
            now_ms: the time by the clock.
            partition: ``[messages]`` where each came from, to be compared with ``schema.partition_of`` its users; None
                does not look.
            partitions: of the topic.
        """
        table, message, inside, sizes, rejected = _from_json(values) if self._format == "json" else _from_arrow(values)
        events, reasons = self._checked(table, now_ms)
        if partition is not None:
            owner = partition_of(events["user_id"], partitions)
            for row in np.flatnonzero(owner != partition[message]).tolist():
                reasons.setdefault(row, f"a user of partition {owner[row]} in partition {partition[message[row]]}")
        for row, reason in reasons.items():
            at = int(message[row]), int(inside[row])
            content = _line(values[at[0]], at[1]) if self._format == "json" else _stream(table.slice(row, 1))
            rejected.append(Rejected(*at, reason, content))
        if reasons:
            kept = np.ones(len(message), bool)
            kept[list(reasons)] = False
            events = {name: column[kept] for name, column in events.items()}
            message, inside = message[kept], inside[kept]
        rejected.sort(key=lambda bad: (bad.message, bad.inside))
        return Decoded(events, message, inside, sizes, rejected)

    def encode(self, events: Columns) -> list[bytes]:
        """Each event as a message."""
        if self._format == "json":
            return self._lines(events)
        table = self._table(events)
        return [_stream(table.slice(row, 1)) for row in range(table.num_rows)]

    def encode_together(self, events: Columns) -> bytes:
        """All events as one message."""
        return b"\n".join(self._lines(events)) if self._format == "json" else _stream(self._table(events))

    def _lines(self, events: Columns) -> list[bytes]:
        template = ", ".join(
            [*(f'"{name}": %d' for name in _IDS), '"domain": %s, "event": %s, "time_ms": %d, "value": %r']
        )
        domains, names = [json.dumps(name) for name in DOMAINS], [json.dumps(name) for name in self._names]
        columns = [
            *(events[name].tolist() for name in _IDS),
            [domains[code] for code in events["domain"].tolist()],
            [names[code] for code in events["event"].tolist()],
            events["time_ms"].tolist(),
            events["value"].tolist(),
        ]
        return [("{" + template % row + "}").encode() for row in zip(*columns, strict=True)]

    def _table(self, events: Columns) -> pa.Table:
        names = pa.array(self._names)
        return pa.table(
            [
                pa.DictionaryArray.from_arrays(pa.array(events[name]), names) if name == "event" else events[name]
                for name in EVENT_COLUMNS.names
            ],
            schema=EVENT_COLUMNS,
        )

    def _checked(self, table: pa.Table, now_ms: int) -> tuple[Columns, dict[int, str]]:
        """Columns of a table, and why rows of it are no events; values of those rows mean nothing."""
        reasons: dict[int, str] = {}

        def refuse(bad: np.ndarray, reason: str) -> None:
            # Later checks are of the more basic kind.
            reasons.update((row, reason) for row in np.flatnonzero(bad).tolist())

        value = table["value"].cast(pa.float64()).fill_null(0.0).to_numpy()
        columns: Columns = {name: table[name].fill_null(0).to_numpy() for name in _INTEGERS}
        time_ms = columns["time_ms"]
        refuse(~(np.abs(value) <= _LARGEST_FLOAT32), "value is not a finite float32")
        refuse(
            time_ms > now_ms + self._ahead_ms, f"time_ms is more than {self._ahead_ms / 3.6e6:g} h ahead of the clock"
        )
        for name in _INTEGERS:
            refuse(columns[name] < 0, f"{name} is negative")
        columns["value"] = np.where(np.abs(value) <= _LARGEST_FLOAT32, value, 0).astype(np.float32)
        for name, known in (("event", self._names), ("domain", DOMAINS)):
            codes = table[name]
            if not pa.types.is_integer(codes.type):
                codes = pc.index_in(codes, value_set=pa.array(known))
            code = codes.fill_null(-1).to_numpy()
            outside = (code < 0) | (code >= len(known))
            for row in np.flatnonzero(outside).tolist():
                reasons[row] = f"{name} {table[name][row].as_py()!r:.80} is unknown; known are {', '.join(known)}"
            columns[name] = np.where(outside, 0, code).astype(np.int8)
        for name in (*_INTEGERS, "domain", "event"):
            if table[name].null_count:
                refuse(table[name].is_null().to_numpy(), f"{name} is missing")
        return {name: columns[name].astype(dtype, copy=False) for name, dtype in EVENT_TYPES.items()}, reasons


_Read = tuple[pa.Table, np.ndarray, np.ndarray, np.ndarray, list[Rejected]]
"""A table of what may be events, ``message``, ``inside`` and ``sizes`` as in :class:`Decoded`, and what is none."""


def _from_json(values: Sequence[bytes]) -> _Read:
    """Lines of messages as columns of ``_JSON_SCHEMA``."""
    values = [value.removesuffix(b"\n") for value in values]
    sizes = np.array([value.count(b"\n") + 1 for value in values], np.int64)
    table = _parse_together(values, int(sizes.sum()))
    if table is not None:
        return table, *_places(sizes, np.ones(len(values), bool)), sizes, []
    # Something in it is not plain: line by line, as far as that is needed.
    text = np.array([_is_text(value) for value in values], bool)
    sizes[~text] = 1
    rejected = [Rejected(place, 0, "not text in UTF-8", values[place]) for place in np.flatnonzero(~text).tolist()]
    lines = list(chain.from_iterable(values[place].split(b"\n") for place in np.flatnonzero(text).tolist()))
    message, inside = _places(sizes, text)
    tables: list[pa.Table] = [_JSON_SCHEMA.empty_table()]
    bad: dict[int, str] = {}
    _parse(lines, 0, tables, bad)
    rejected += [Rejected(int(message[row]), int(inside[row]), reason, lines[row]) for row, reason in bad.items()]
    kept = np.ones(len(lines), bool)
    kept[list(bad)] = False
    return pa.concat_tables(tables).combine_chunks(), message[kept], inside[kept], sizes, rejected


def _is_text(value: bytes) -> bool:
    if not value.isascii():
        try:
            value.decode()
        except UnicodeDecodeError:
            return False
    return True


def _places(sizes: np.ndarray, whole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Message of every event, and which event of it, of the messages where ``whole`` is set."""
    sizes = sizes[whole]
    message = np.repeat(np.flatnonzero(whole), sizes)
    return message, np.arange(len(message)) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _parse(lines: list[bytes], first: int, tables: list[pa.Table], bad: dict[int, str]) -> None:
    """Parse lines, whose first one has the number ``first``, in order; halves of what Arrow does not take."""
    table = _parse_together(lines, len(lines))
    if table is not None:
        tables.append(table)
    elif len(lines) > _FEW:
        half = len(lines) // 2
        _parse(lines[:half], first, tables, bad)
        _parse(lines[half:], first + half, tables, bad)
    else:
        rows = []
        for number, line in enumerate(lines, first):
            row = _parse_one(line)
            if isinstance(row, str):
                bad[number] = row
            else:
                rows.append(row)
        tables.append(pa.Table.from_pylist(rows, schema=_JSON_SCHEMA))


def _parse_together(parts: list[bytes], lines: int) -> pa.Table | None:
    """Parts of so many lines by Arrow's parser; None if any line is not plainly one flat object.

    What it takes, ``_parse_one`` takes with the same values.
    """
    joined = b"\n".join(parts)
    objects = joined.count(b"{")
    if not objects or objects != lines or not joined.startswith(b"{") or joined.count(b"\n{") != lines - 1:
        return None
    if not _is_text(joined):
        return None
    try:
        # One block, since a line may not be longer than one.
        read = paj.ReadOptions(use_threads=False, block_size=len(joined) + 1)
        table = paj.read_json(pa.py_buffer(joined), read_options=read, parse_options=_PARSE)
    except pa.ArrowException:
        return None
    return table.select(_JSON_SCHEMA.names).combine_chunks() if table.num_rows == lines else None


def _parse_one(line: bytes) -> dict[str, int | float | str | None] | str:
    """A line as a row of ``_JSON_SCHEMA``, or why it is none."""
    try:
        parsed = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        return f"not JSON: {str(error).splitlines()[0]:.80}"
    if not isinstance(parsed, dict):
        return f"not a JSON object but {type(parsed).__name__}"
    row: dict[str, int | float | str | None] = {}
    for name in _JSON_SCHEMA.names:
        value = parsed.get(name)
        fits, kind = _KINDS[name]
        if value is not None and not fits(value):
            return f"{name} is {value!a:.80}, not {kind}"
        if name == "value" and type(value) is int:
            # As Arrow reads it: what no float can hold is infinite.
            value = float(value) if abs(value) <= _LARGEST_FLOAT32 else math.inf
        row[name] = value
    return row


def _is_integer(value: object) -> bool:
    return type(value) is int and -(1 << 63) <= value < 1 << 63


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _is_string(value: object) -> bool:
    # Half of a pair of UTF-16 is JSON, and no text.
    return type(value) is str and not any("\ud800" <= character <= "\udfff" for character in value)


_KINDS: dict[str, tuple[Callable[[object], bool], str]] = {
    **dict.fromkeys(_INTEGERS, (_is_integer, "a 64-bit integer")),
    **dict.fromkeys(("domain", "event"), (_is_string, "a string")),
    "value": (_is_number, "a number"),
}


def _from_arrow(values: Sequence[bytes]) -> _Read:
    """IPC streams as one table of events."""
    tables: list[pa.Table] = [_NAMED_EVENTS.empty_table()]
    rejected: list[Rejected] = []
    sizes = np.ones(len(values), np.int64)
    whole = np.ones(len(values), bool)
    opened: list[pa.Table] = []
    for place, value in enumerate(values):
        try:
            with pa.ipc.open_stream(value) as stream:
                opened.append(stream.read_all())
        except _NOT_ARROW as error:
            opened.append(pa.table({}))
            rejected.append(_not_arrow(place, value, error))
            whole[place] = False
    try:
        # Most messages share a schema: what is done with all of them at once costs little.
        tables.append(_named(pa.concat_tables([opened[place] for place in np.flatnonzero(whole).tolist()])))
        sizes[whole] = [opened[place].num_rows for place in np.flatnonzero(whole).tolist()]
    except _NOT_ARROW:
        for place in np.flatnonzero(whole).tolist():
            try:
                tables.append(_named(opened[place]))
                sizes[place] = opened[place].num_rows
            except _NOT_ARROW as error:
                rejected.append(_not_arrow(place, values[place], error))
                whole[place] = False
    return pa.concat_tables(tables).combine_chunks(), *_places(sizes, whole), sizes, rejected


def _named(table: pa.Table) -> pa.Table:
    """A table that was read, in the columns of ``EVENT_COLUMNS``, events by name."""
    table.validate(full=True)
    missing = [name for name in EVENT_COLUMNS.names if name not in table.column_names]
    if missing:
        raise pa.ArrowInvalid(f"it has no column {missing[0]}")
    return table.select(EVENT_COLUMNS.names).cast(_NAMED_EVENTS)


def _not_arrow(place: int, value: bytes, error: Exception) -> Rejected:
    said = (str(error).splitlines() or [type(error).__name__])[0]
    return Rejected(place, 0, f"not an Arrow stream of events: {said:.120}", value)


def _line(value: bytes, inside: int) -> bytes:
    return value.split(b"\n")[inside]


def _stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()
