"""Datasets that have only an event log, as input of the ``limelight stream`` commands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.stream.random_logs import SPEC, columns_of
from tests.stream.reference import Event
from trainer.data.format.schema import partition_of
from trainer.data.format.visit_events import event_table

Edit = Callable[[pa.Table], pa.Table]


def write_log(path: Path, events: Sequence[Event], edit: Edit | None = None, values: Sequence[float] = ()) -> Path:
    """Write a log of events in order of arrival; ``edit`` may change the table of each partition with events."""
    (path / "events").mkdir(parents=True)
    columns = columns_of(list(events))
    if values:
        columns["value"][:] = values
    owner = partition_of(columns["user_id"], SPEC.partitions)
    for partition in range(SPEC.partitions):
        table = event_table(SPEC, {name: column[owner == partition] for name, column in columns.items()})
        if edit is not None and table.num_rows:
            table = edit(table)
        pq.write_table(table, path / "events" / f"part-{partition:05d}.parquet")
    (path / "dataset.json").write_text(replace(SPEC, events=len(events)).to_json())
    return path


def with_column(name: str, values: pa.Array) -> Edit:
    """Return an edit that replaces a column."""
    return lambda table: table.set_column(table.column_names.index(name), name, values)
