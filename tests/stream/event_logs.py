"""Random event logs for tests of sources, in memory and stored, and the events that a source must give.

The logged features of an exposure are a function of its visit, so that a test knows them wherever the event comes from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from tests.stream.random_logs import SPEC
from trainer.data.format.schema import KINDS, partition_of, row_columns
from trainer.data.format.shards import write_rows
from trainer.data.format.validation import Columns
from trainer.data.format.visit_events import event_names, event_table
from trainer.stream.labels.assembled_rows import EVENT_TYPES, EXPOSURE
from trainer.stream.sources.logged_features import FEATURES, RequestFeatures
from trainer.stream.sources.source import EventBatch, Position

START_MS = 1_700_000_000_000
Event = tuple[float, ...]
"""Values in the order of ``EVENT_TYPES``."""


def random_events(seed: int, events: int, users: int = 40, span_ms: int = 60_000) -> Columns:
    """Return events in time order, many at the same millisecond; each has another visit id."""
    rng = np.random.default_rng(seed)
    columns = {
        "user_id": rng.integers(0, users, events),
        "author_id": rng.integers(0, 1 << 40, events),
        "item_id": rng.integers(0, 90, events),
        "domain": rng.integers(0, 2, events),
        "visit_id": rng.permutation(events),
        "event": rng.integers(0, len(event_names(SPEC)), events),
        "time_ms": START_MS + np.sort(rng.integers(0, span_ms // 10, events)) * 10,
        "value": rng.random(events).astype(np.float32),
    }
    return {name: columns[name].astype(dtype) for name, dtype in EVENT_TYPES.items()}


def by_partition(events: Columns, partitions: int = SPEC.partitions) -> dict[int, Columns]:
    """Return the events of each partition, in order."""
    owner = partition_of(events["user_id"], partitions)
    return {p: {name: column[owner == p] for name, column in events.items()} for p in range(partitions)}


def logged_of(events: Columns) -> RequestFeatures:
    """Return the logged features of events: four of five exposures have some."""
    at = np.flatnonzero((events["event"] == EXPOSURE) & (events["visit_id"] % 5 != 0))
    visit = events["visit_id"][at, None]
    side = visit * [3, 7] % [side.rows for side in SPEC.side]
    dense = np.sin(visit * np.arange(1, 1 + len(SPEC.dense)))
    stat = visit * (1 + np.arange(*row_columns(SPEC)["stat"][1])) % 101
    return RequestFeatures(at, side.astype(np.int32), dense.astype(np.float32), stat.astype(np.float32))


def assert_logged(events: Columns, logged: RequestFeatures) -> None:
    """Check that the events have exactly their logged features."""
    for name, found in vars(logged).items():
        expected = getattr(logged_of(events), name)
        np.testing.assert_array_equal(found, expected, name)
        assert found.dtype == expected.dtype, name


def rows_of(events: Columns) -> dict[str, np.ndarray]:
    """Return training rows of the exposures, with their logged features."""
    logged = logged_of(events)
    rows = {name: np.zeros((len(logged), *shape), dtype) for name, (dtype, shape) in row_columns(SPEC).items()}
    rows |= {name: events[name][logged.at] for name in ("visit_id", "user_id", "author_id", "item_id")}
    rows |= {name: getattr(logged, name) for name in FEATURES}
    rows["domain"], rows["kind"] = events["domain"][logged.at].astype(np.uint8), rows["kind"] + KINDS.index("full")
    rows["request_ms"] = events["time_ms"][logged.at]
    rows["emit_ms"] = rows["request_ms"] + rows["visit_id"] * 37 % 9_000
    return rows


def store(path: Path, events: Columns, row_group_size: int = 300) -> Path:
    """Write a dataset of events and of the rows of their exposures."""
    (path / "events").mkdir(parents=True)
    for p, columns in by_partition(events).items():
        file = path / "events" / f"part-{p:05d}.parquet"
        pq.write_table(event_table(SPEC, columns), file, row_group_size=row_group_size)
    rows = rows_of(events)
    write_rows(path, SPEC, rows, rows_per_record=20, records_per_shard=4)
    span = (int(events["time_ms"][0]), int(events["time_ms"][-1]))
    spec = replace(SPEC, events=len(events["time_ms"]), span_ms=span, rows=len(rows["visit_id"]))
    (path / "dataset.json").write_text(spec.to_json())
    return path


def as_tuples(events: Columns) -> list[Event]:
    """Return events as tuples, for comparison."""
    return list(zip(*(events[name].tolist() for name in EVENT_TYPES), strict=True))


def merged(events: Columns, partitions: Iterable[int]) -> list[Event]:
    """Return the events of a rank in merge order: by the latest time of the partition so far, ties by partition."""
    keyed = []
    for p in partitions:
        latest = 0
        for place, event in enumerate(as_tuples(by_partition(events)[p])):
            latest = max(latest, int(event[list(EVENT_TYPES).index("time_ms")]))
            keyed.append((latest, p, place, event))
    return [event for *_, event in sorted(keyed)]


def events_of(batches: Iterable[EventBatch]) -> list[Event]:
    """Return the events of batches, in order."""
    return [event for batch in batches for event in as_tuples(batch.events)]


def content(batch: EventBatch) -> tuple[list[Event], list[int], Position]:
    """Return everything in a batch that does not depend on the clock, except the logged features."""
    assert len(batch) == len(batch.arrived_ms) == len(batch.events["time_ms"])
    assert all(batch.events[name].dtype == dtype for name, dtype in EVENT_TYPES.items())
    return as_tuples(batch.events), batch.partition.tolist(), batch.position


def merge_positions(positions: Iterable[Mapping[int, Sequence[int]]]) -> Position:
    """Return the position of a job from those of its ranks, which share no partition."""
    merged: Position = {}
    for position in positions:
        assert not merged.keys() & position.keys(), "two ranks own the same partition"
        merged |= {int(partition): list(at) for partition, at in position.items()}
    return dict(sorted(merged.items()))
