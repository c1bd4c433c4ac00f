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


def derive_events(spec: DatasetSpec, visits: Columns) -> Columns:
    """The events of visits, in time order: columns of ``EVENT_COLUMNS`` with ``event`` as a code.

    Each visit gives an ``exposure`` at its request, ``enter`` at the same time if anything was watched, every behaviour
    at its first time, and ``exit``. Events of one millisecond are in the order of ``event_names``, ``exit`` last.
    """
    n = len(visits["visit_id"])
    request, every = visits["request_ms"], np.arange(n)
    entered = np.flatnonzero(visits["play_ms"] > 0)
    visit, time, code = [every, entered], [request, request[entered]], [0, 1]
    value = [np.zeros(n, np.float32), np.zeros(len(entered), np.float32)]
    for k, behaviour in enumerate(spec.behaviours):
        delay = visits[f"delay_{behaviour}"]
        happened = np.flatnonzero(delay >= 0)
        visit.append(happened)
        time.append(request[happened] + delay[happened])
        code.append(len(VISIT_EVENTS) + k)
        values = visits.get(f"value_{behaviour}")
        value.append(np.zeros(len(happened), np.float32) if values is None else values[happened])
    visit.append(every)
    time.append(visits["exit_ms"])
    code.append(VISIT_EVENTS.index("exit"))
    value.append(visits["play_ms"].astype(np.float32))

    time_ms = np.concatenate(time)
    order = stable_order(time_ms)
    of_visit = np.concatenate(visit)[order]
    events = {name: visits[name][of_visit] for name in ("user_id", "author_id", "item_id", "domain", "visit_id")}
    events["event"] = np.repeat(np.array(code, np.int8), [len(part) for part in visit])[order]
    events["time_ms"] = time_ms[order]
    events["value"] = np.concatenate(value)[order]
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
