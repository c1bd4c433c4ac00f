"""Writes the training rows of a stored log to a Parquet file, for ``limelight stream assemble``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.console.errors import UserError, failure_reason
from trainer.data.format.schema import KINDS, DatasetSpec
from trainer.data.format.validation import Columns
from trainer.stream.labels.assembled_rows import (
    REASONS,
    AssembledRows,
    concatenate,
    no_rows,
    row_table,
    unused_event_table,
)
from trainer.stream.labels.batch_assembler import visit_rows
from trainer.stream.labels.event_log import EventLog
from trainer.stream.labels.policy import EventTimeouts, FastSlow, Policy
from trainer.stream.labels.streaming_assembler import StreamAssembler
from trainer.stream.labels.visit_grouping import group_visits

Mode = Literal["batch", "incremental"]

_EVENTS_AT_ONCE = 1 << 18
_ROWS_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class AssemblySummary:
    """Numbers of rows and events that ``assemble_dataset`` has written.

    Attributes:
        rows: number of rows by kind; only kinds that have rows.
        visits: number of visits.
        fast_slow_rows: number of rows of the same visits under ``fast_slow`` with the paper's windows.
        unused_events: number of events that changed no row, by reason.
        unused_file: file of these events; None if there are none.
    """

    rows: dict[str, int]
    visits: int
    fast_slow_rows: int
    unused_events: dict[str, int]
    unused_file: Path | None


def assemble_dataset(
    path: str | Path,
    policy: Policy,
    timeouts: EventTimeouts,
    out: str | Path,
    mode: Mode = "batch",
    progress: Callable[[int, int], None] | None = None,
) -> AssemblySummary:
    """Write the rows of a policy to ``out``, partition by partition, in the row order of each partition.

    Columns are those of ``assembled_rows.row_table``. Events that change no row go to ``OUT.unused_events.parquet``
    in the same directory; without such events there is no such file. Both files are written under a temporary name and
    renamed. Memory is bounded by the events and rows of one partition.

    Args:
        path: dataset, a directory or an fsspec URL.
        policy: report policy.
        timeouts: limits for late events and for idle visits.
        out: Parquet file; an existing file is replaced.
        mode: ``batch`` or ``incremental`` assembler; both write the same rows.
        progress: called with the number of events done and the number of all events.

    Raises:
        UserError: there is no dataset at ``path``, an event is invalid, or ``out`` cannot be written.
    """
    log = EventLog(path)
    out = Path(out)
    unused_file = out.with_name(unused_events_name(out))
    kinds, reasons = np.zeros(len(KINDS), np.int64), np.zeros(len(REASONS), np.int64)
    done = visits = fast_slow_rows = 0
    with _parquet_file(out) as write_rows, _parquet_file(unused_file) as write_unused:
        # The file has its columns even if the log gives no row.
        write_rows(row_table(log.spec, no_rows(log.spec)))
        for partition in range(log.spec.partitions):
            events = log.read(partition)
            grouped = group_visits(log.spec, events, timeouts)
            visits += len(grouped.end_ms)
            # The command prints the ratio to this policy, as the paper does.
            fast_slow_rows += len(visit_rows(grouped, FastSlow())["kind"])
            if mode == "batch":
                whole = AssembledRows(visit_rows(grouped, policy), grouped.started(), concatenate(grouped.unused))
                made = iter([(whole, len(events["time_ms"]))])
            else:
                made = _stream(log.spec, policy, timeouts, events)
            for part, taken in made:
                kinds += np.bincount(part.rows["kind"], minlength=len(KINDS))
                reasons += np.bincount(part.unused["reason"], minlength=len(REASONS))
                for first in range(0, len(part.rows["kind"]), _ROWS_AT_ONCE):
                    piece = {name: column[first : first + _ROWS_AT_ONCE] for name, column in part.rows.items()}
                    write_rows(row_table(log.spec, piece))
                if len(part.unused["reason"]):
                    write_unused(unused_event_table(log.spec, part.unused))
                done += taken
                if progress is not None:
                    progress(done, max(log.spec.events, done))
    unused_events = dict(zip(REASONS, reasons.tolist(), strict=True))
    return AssemblySummary(
        {kind: count for kind, count in zip(KINDS, kinds.tolist(), strict=True) if count},
        visits,
        fast_slow_rows,
        unused_events,
        unused_file if any(unused_events.values()) else None,
    )


def unused_events_name(out: str | Path) -> str:
    """Return the name of the file of unused events, which is written beside the file of rows."""
    return f"{Path(out).name.removesuffix('.parquet')}.unused_events.parquet"


def _stream(
    spec: DatasetSpec, policy: Policy, timeouts: EventTimeouts, events: Columns
) -> Iterator[tuple[AssembledRows, int]]:
    """Run the streaming assembler over a partition; yields its output and the number of events of each portion."""
    assembler = StreamAssembler(spec, policy, timeouts)
    for first in range(0, len(events["time_ms"]), _EVENTS_AT_ONCE):
        portion = {name: column[first : first + _EVENTS_AT_ONCE] for name, column in events.items()}
        yield assembler.push(portion), len(portion["time_ms"])
    # The log has ended: advance past all remaining timers.
    yield assembler.advance(), 0


@contextmanager
def _parquet_file(file: Path) -> Iterator[Callable[[pa.Table], None]]:
    """Write tables to a temporary file and rename it to ``file`` at the end; without a table, delete ``file``."""
    tmp_path = file.with_name(f".{file.name}.partial-{os.getpid()}")
    writer: pq.ParquetWriter | None = None

    def write(table: pa.Table) -> None:
        nonlocal writer
        with _reported_as_user_error(file):
            if writer is None:
                writer = pq.ParquetWriter(tmp_path, table.schema)
            writer.write_table(table)

    try:
        yield write
        with _reported_as_user_error(file):
            if writer is None:
                file.unlink(missing_ok=True)
            else:
                writer.close()
                tmp_path.replace(file)
    finally:
        if writer is not None:
            # On a full disk, closing fails again; the content of the file no longer matters.
            with suppress(OSError):
                writer.close()
        with suppress(OSError):
            tmp_path.unlink(missing_ok=True)


@contextmanager
def _reported_as_user_error(file: Path) -> Iterator[None]:
    """Turn a file system error into a ``UserError`` that names the file."""
    try:
        yield
    except OSError as error:
        reason = failure_reason(error)
        raise UserError(f"{file}: cannot be written ({reason})") from error
