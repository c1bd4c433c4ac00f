"""Derives events, behaviour bits, labels and masks from visits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from trainer.data.format.schema import DOMAINS, EVENT_COLUMNS, VISIT_EVENTS, DatasetSpec
from trainer.data.format.sorting import stable_order
from trainer.data.format.validation import Columns

_VISITS_PER_PART = 1 << 15

# Events of one millisecond are in this order: exposure, enter, behaviours (at most 31), their repeats, exit.
_RANK_BITS = 6
_REPEAT_RANK, _EXIT_RANK = (1 << _RANK_BITS) - 2, (1 << _RANK_BITS) - 1


def event_names(spec: DatasetSpec) -> tuple[str, ...]:
    """Return the names of the events; the code of an event in the log's dictionary is its position in this tuple."""
    return (*VISIT_EVENTS, *spec.behaviours)


def behaviour_bits(spec: DatasetSpec, visits: Columns) -> np.ndarray:
    """Return the behaviours of each visit as bits, ``[n] int32``: bit k is set if behaviour k happened."""
    bits = np.zeros(len(visits["visit_id"]), np.int32)
    for k, behaviour in enumerate(spec.behaviours):
        bits |= (visits[f"delay_{behaviour}"] >= 0).astype(np.int32) << k
    return bits


def labels(spec: DatasetSpec, bits: np.ndarray) -> np.ndarray:
    """Convert behaviour bits to labels, ``[n, behaviours] uint8``."""
    return ((bits[:, None] >> np.arange(len(spec.behaviours), dtype=np.int32)) & 1).astype(np.uint8)


def label_bits(label: np.ndarray) -> np.ndarray:
    """Convert labels ``[n, behaviours]`` of 0 and 1 to behaviour bits ``[n] int32``; the inverse of :func:`labels`."""
    return (label.astype(np.int32) << np.arange(label.shape[1], dtype=np.int32)).sum(axis=1, dtype=np.int32)


def masks(spec: DatasetSpec, domain: np.ndarray) -> np.ndarray:
    """Return the label mask, ``[n, behaviours] uint8``: 1 if the behaviour can happen in the domain of the row."""
    applies = np.array(
        [[name in spec.applies[behaviour] for behaviour in spec.behaviours] for name in DOMAINS], np.uint8
    )
    return applies[domain]


def derive_events(spec: DatasetSpec, visits: Columns, repeats: Columns | None = None) -> Iterator[Columns]:
    """Yield the events of visits in time order, as columns of ``EVENT_COLUMNS`` with ``event`` as a code.

    Each visit gives an ``exposure`` at its request, ``enter`` at the same time if anything was watched, each behaviour
    at its first time, and ``exit``. Events of one millisecond are in the order of ``event_names``, then the repeats,
    then ``exit``.

    Args:
        spec: description of the dataset.
        visits: columns of ``schema.visit_schema``, in order of ``request_ms``.
        repeats: more events of these visits, with the columns of the result, in any order.

    Yields:
        Parts of the events; a part and the events that wait for later parts fit in the processor's cache.
    """
    request = visits["request_ms"]
    n = len(request)
    # The ids of the repeats are appended to those of the visits, so that one line number finds either.
    ids = {name: visits[name] for name in ("user_id", "author_id", "item_id", "domain", "visit_id")}
    more = waiting = _VisitEvents(*(np.empty(0, dtype) for dtype in (np.int64, np.int64, np.int8, np.int8, np.float32)))
    if repeats is not None:
        ids = {name: np.concatenate([column, repeats[name]]) for name, column in ids.items()}
        line, time, event = np.arange(n, len(ids["visit_id"])), repeats["time_ms"], repeats["event"]
        more = _VisitEvents(line, time, event, np.full(len(line), _REPEAT_RANK, np.int8), repeats["value"])
        more = more.take(stable_order(time))
    start = request[0] if n else 0
    for first in range(0, max(n, 1), _VISITS_PER_PART):
        stop = first + _VISITS_PER_PART
        until = request[stop] if stop < n else np.iinfo(np.int64).max
        due = int(np.searchsorted(more.time_ms, until))
        known = _VisitEvents.join(waiting, _events_of(spec, visits, first, stop), more.take(slice(0, due)))
        more = more.take(slice(due, None))
        ready = known.time_ms < until
        waiting = known.take(np.flatnonzero(~ready))
        known = known.take(np.flatnonzero(ready))
        # Time and rank in one integer: one sort instead of two.
        known = known.take(stable_order((known.time_ms - start) << _RANK_BITS | known.rank))
        yield {
            **{name: np.take(column, known.line) for name, column in ids.items()},
            "event": known.event,
            "time_ms": known.time_ms,
            "value": known.value,
        }


@dataclass(frozen=True)
class _VisitEvents:
    """Events as columns.

    Attributes:
        line: line of the visit in the table of ids.
        time_ms: time of the event.
        event: code of the event.
        rank: order of the events within a millisecond.
        value: value of the event.
    """

    line: np.ndarray
    time_ms: np.ndarray
    event: np.ndarray
    rank: np.ndarray
    value: np.ndarray

    def take(self, which: np.ndarray | slice) -> _VisitEvents:
        """Return the events at some positions."""
        return _VisitEvents(*(column[which] for column in vars(self).values()))

    @staticmethod
    def join(*parts: _VisitEvents) -> _VisitEvents:
        """Return the events of all parts, one part after the other."""
        return _VisitEvents(
            *(np.concatenate(columns) for columns in zip(*(vars(part).values() for part in parts), strict=True))
        )


def _events_of(spec: DatasetSpec, visits: Columns, first: int, stop: int) -> _VisitEvents:
    """Return the events of the visits ``[first, stop)``, ordered by kind and then by visit."""
    part = {name: column[first:stop] for name, column in visits.items()}
    request = part["request_ms"]
    every, entered = np.arange(len(request)), np.flatnonzero(part["play_ms"] > 0)
    line, time = [every, entered], [request, request[entered]]
    event, value = [0, 1], [np.zeros(len(every), np.float32), np.zeros(len(entered), np.float32)]
    for k, behaviour in enumerate(spec.behaviours):
        delay = part[f"delay_{behaviour}"]
        happened = np.flatnonzero(delay >= 0)
        line.append(happened)
        time.append(request[happened] + delay[happened])
        event.append(len(VISIT_EVENTS) + k)
        values = part.get(f"value_{behaviour}")
        value.append(np.zeros(len(happened), np.float32) if values is None else values[happened])
    line.append(every)
    time.append(part["exit_ms"])
    event.append(VISIT_EVENTS.index("exit"))
    value.append(part["play_ms"].astype(np.float32))
    rank = [*event[:-1], _EXIT_RANK]
    lengths = [len(lines) for lines in line]
    codes, ranks = (np.repeat(np.array(column, np.int8), lengths) for column in (event, rank))
    return _VisitEvents(first + np.concatenate(line), np.concatenate(time), codes, ranks, np.concatenate(value))


def event_codes(spec: DatasetSpec, column: pa.ChunkedArray) -> np.ndarray:
    """Return the codes of a column of event names, ``[n] int8``; -1 for nulls and for names unknown to the dataset."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    names = event_names(spec)
    codes = [np.empty(0, np.int8)]
    for chunk in column.chunks:
        known = [names.index(name) if name in names else -1 for name in chunk.dictionary.to_pylist()]
        # Nulls point behind the last name of the dictionary, where the code -1 is.
        codes.append(np.array([*known, -1], np.int8)[chunk.indices.fill_null(len(known)).to_numpy()])
    return np.concatenate(codes)


def event_table(spec: DatasetSpec, events: Columns) -> pa.Table:
    """Return events as an Arrow table with the schema ``EVENT_COLUMNS``."""
    arrays = [
        pa.DictionaryArray.from_arrays(pa.array(events["event"]), pa.array(event_names(spec)))
        if name == "event"
        else pa.array(events[name])
        for name in EVENT_COLUMNS.names
    ]
    return pa.table(arrays, schema=EVENT_COLUMNS)
