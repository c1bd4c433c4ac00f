"""A dataset's log as the training rows of a policy, in a Parquet file: ``limelight stream assemble``."""

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

from trainer.console.errors import UserError
from trainer.data.format.schema import KINDS, DatasetSpec
from trainer.data.format.validation import Columns
from trainer.stream.labels.assembled_rows import REASONS, Assembled, aside_table, concatenate, no_rows, row_table
from trainer.stream.labels.batch_assembler import visit_rows
from trainer.stream.labels.event_log import EventLog
from trainer.stream.labels.policy import EventTimeouts, FastSlow, Policy
from trainer.stream.labels.streaming_assembler import StreamAssembler
from trainer.stream.labels.visit_grouping import group_visits

Mode = Literal["batch", "incremental"]

_EVENTS_AT_ONCE = 1 << 18
_ROWS_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        rows: number of rows by kind, those of the policy only.
        visits: number of visits.
        fast_slow_rows: how many rows the same visits give under ``fast_slow`` with the paper's windows.
        aside: number of events set aside, by reason.
        aside_file: where they are, if there are any.
    """

    rows: dict[str, int]
    visits: int
    fast_slow_rows: int
    aside: dict[str, int]
    aside_file: Path | None


def assemble_dataset(
    path: str | Path,
    policy: Policy,
    timeouts: EventTimeouts,
    out: str | Path,
    mode: Mode = "batch",
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Write the rows of a policy to ``out``, partition after partition, each in the order of its rows.

    Columns are those of ``rows.row_table``. Events that change no row go to ``OUT.aside.parquet`` beside it, if there
    are any. Both files are written aside and renamed. Memory is bounded by the events and rows of one partition.

    Args:
        path: dataset, a directory or an fsspec URL.
        policy: which rows.
        timeouts: what is late, and when a visit without an exit has ended.
        out: Parquet file; one that exists is replaced.
        mode: the assembler; both write the same rows.
        progress: told the events done, and how many there are.

    Raises:
        UserError: no dataset there, an event that cannot be, or ``out`` cannot be written.
    """
    log = EventLog(path)
    out = Path(out)
    aside_file = out.with_name(f"{out.name.removesuffix('.parquet')}.aside.parquet")
    kinds, reasons = np.zeros(len(KINDS), np.int64), np.zeros(len(REASONS), np.int64)
    done = visits = fast_slow_rows = 0
    with _parquet_file(out) as write_rows, _parquet_file(aside_file) as write_aside:
        write_rows(row_table(log.spec, no_rows(log.spec)))
        for partition in range(log.spec.partitions):
            events = log.read(partition)
            grouped = group_visits(log.spec, events, timeouts)
            visits += len(grouped.end_ms)
            fast_slow_rows += len(visit_rows(grouped, FastSlow())["kind"])
            if mode == "batch":
                whole = Assembled(visit_rows(grouped, policy), grouped.begun(), concatenate(grouped.aside))
                made = iter([(whole, len(events["time_ms"]))])
            else:
                made = _stream(log.spec, policy, timeouts, events)
            for part, taken in made:
                kinds += np.bincount(part.rows["kind"], minlength=len(KINDS))
                reasons += np.bincount(part.aside["reason"], minlength=len(REASONS))
                for first in range(0, len(part.rows["kind"]), _ROWS_AT_ONCE):
                    piece = {name: column[first : first + _ROWS_AT_ONCE] for name, column in part.rows.items()}
                    write_rows(row_table(log.spec, piece))
                if len(part.aside["reason"]):
                    write_aside(aside_table(log.spec, part.aside))
                done += taken
                if progress is not None:
                    progress(done, max(log.spec.events, done))
    aside = dict(zip(REASONS, reasons.tolist(), strict=True))
    return Written(
        {kind: count for kind, count in zip(KINDS, kinds.tolist(), strict=True) if count},
        visits,
        fast_slow_rows,
        aside,
        aside_file if any(aside.values()) else None,
    )


def _stream(
    spec: DatasetSpec, policy: Policy, timeouts: EventTimeouts, events: Columns
) -> Iterator[tuple[Assembled, int]]:
    """The events of a partition through the incremental assembler, with the number of events of each portion."""
    assembler = StreamAssembler(spec, policy, timeouts)
    for first in range(0, len(events["time_ms"]), _EVENTS_AT_ONCE):
        portion = {name: column[first : first + _EVENTS_AT_ONCE] for name, column in events.items()}
        yield assembler.push(portion), len(portion["time_ms"])
    yield assembler.advance(), 0


@contextmanager
def _parquet_file(file: Path) -> Iterator[Callable[[pa.Table], None]]:
    """Writes tables into a file that gets its name when the block ends well; if none was written, none is there."""
    aside = file.with_name(f".{file.name}.partial-{os.getpid()}")
    writer: pq.ParquetWriter | None = None

    def write(table: pa.Table) -> None:
        nonlocal writer
        with _telling(file):
            if writer is None:
                writer = pq.ParquetWriter(aside, table.schema)
            writer.write_table(table)

    try:
        yield write
        with _telling(file):
            if writer is None:
                file.unlink(missing_ok=True)
            else:
                writer.close()
                aside.replace(file)
    finally:
        if writer is not None:
            # Where the disk is full, closing fails again; what is in the file no longer matters.
            with suppress(OSError):
                writer.close()
        with suppress(OSError):
            aside.unlink(missing_ok=True)


@contextmanager
def _telling(file: Path) -> Iterator[None]:
    """Errors of the file system are the user's, and those of this file."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise UserError(f"{file}: cannot be written ({reason})") from error
