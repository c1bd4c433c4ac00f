"""What follows from visits alone: events, behaviour bits, labels and masks."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from trainer.data.checks import Columns
from trainer.data.order import stable_order
from trainer.data.schema import DOMAINS, EVENT_COLUMNS, VISIT_EVENTS, DatasetSpec


def event_names(spec: DatasetSpec) -> tuple[str, ...]:
    """Names of the events; codes in the event log's dictionary are positions in this tuple."""
    return (*VISIT_EVENTS, *spec.behaviours)


def behaviour_bits(spec: DatasetSpec, visits: Columns) -> np.ndarray:
    """``[n] int32``, bit k set where behaviour k happened."""
    bits = np.zeros(len(visits["visit_id"]), np.int32)
    for k, behaviour in enumerate(spec.behaviours):
        bits |= (visits[f"delay_{behaviour}"] >= 0).astype(np.int32) << k
    return bits


def labels(spec: DatasetSpec, bits: np.ndarray) -> np.ndarray:
    """Behaviour bits as ``[n, behaviours] uint8``."""
    return ((bits[:, None] >> np.arange(len(spec.behaviours), dtype=np.int32)) & 1).astype(np.uint8)


def masks(spec: DatasetSpec, domain: np.ndarray) -> np.ndarray:
    """``[n, behaviours] uint8``, 1 where the behaviour can happen in the row's domain."""
    applies = np.array(
        [[name in spec.applies[behaviour] for behaviour in spec.behaviours] for name in DOMAINS], np.uint8
    )
    return applies[domain]


def derive_events(spec: DatasetSpec, visits: Columns, repeats: Columns | None = None) -> Columns:
    """The events of visits, in time order: columns of ``EVENT_COLUMNS`` with ``event`` as a code.

    Each visit gives an ``exposure`` at its request, ``enter`` at the same time if anything was watched, every behaviour
    at its first time, and ``exit``. Events of one millisecond are in the order of ``event_names``, then the repeats,
    ``exit`` last.

    Args:
        spec: of the dataset.
        visits: as ``schema.visit_schema`` has them.
        repeats: more events of these visits, in the form of the result, in any order.
    """
    n = len(visits["visit_id"])
    request, every = visits["request_ms"], np.arange(n)
    entered = np.flatnonzero(visits["play_ms"] > 0)
    line, time = [every, entered], [request, request[entered]]
    code, value = [0, 1], [np.zeros(n, np.float32), np.zeros(len(entered), np.float32)]
    for k, behaviour in enumerate(spec.behaviours):
        delay = visits[f"delay_{behaviour}"]
        happened = np.flatnonzero(delay >= 0)
        line.append(happened)
        time.append(request[happened] + delay[happened])
        code.append(len(VISIT_EVENTS) + k)
        values = visits.get(f"value_{behaviour}")
        value.append(np.zeros(len(happened), np.float32) if values is None else values[happened])
    event = np.repeat(np.array(code, np.int8), [len(part) for part in line])
    # Lines of the repeats come behind those of the visits.
    more = {name: column[:0] for name, column in visits.items()} if repeats is None else repeats
    if repeats is not None:
        line.append(np.arange(n, n + len(repeats["time_ms"])))
        time.append(repeats["time_ms"])
        value.append(repeats["value"])
        event = np.concatenate([event, repeats["event"]])
    line.append(every)
    time.append(visits["exit_ms"])
    value.append(visits["play_ms"].astype(np.float32))
    event = np.concatenate([event, np.full(n, VISIT_EVENTS.index("exit"), np.int8)])

    time_ms = np.concatenate(time)
    order = stable_order(time_ms)
    at = np.concatenate(line)[order]
    names = ("user_id", "author_id", "item_id", "domain", "visit_id")
    events = {name: np.take(np.concatenate([visits[name], more[name]]), at) for name in names}
    events["event"] = np.take(event, order)
    events["time_ms"] = np.take(time_ms, order)
    events["value"] = np.take(np.concatenate(value), order)
    return events


def event_codes(spec: DatasetSpec, column: pa.ChunkedArray) -> np.ndarray:
    """Codes of a column of event names, ``[n] int8``; -1 for names that are not the dataset's, and for nulls."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    names = event_names(spec)
    codes = [np.empty(0, np.int8)]
    for chunk in column.chunks:
        known = [names.index(name) if name in names else -1 for name in chunk.dictionary.to_pylist()]
        # Nulls take the code behind the last name's.
        codes.append(np.array([*known, -1], np.int8)[chunk.indices.fill_null(len(known)).to_numpy()])
    return np.concatenate(codes)


def event_table(spec: DatasetSpec, events: Columns) -> pa.Table:
    """Events as an Arrow table with the schema ``EVENT_COLUMNS``."""
    arrays = [
        pa.DictionaryArray.from_arrays(pa.array(events["event"]), pa.array(event_names(spec)))
        if name == "event"
        else pa.array(events[name])
        for name in EVENT_COLUMNS.names
    ]
    return pa.table(arrays, schema=EVENT_COLUMNS)
