"""Builds a dataset from visits. All datasets are made here, whether imported or simulated.

``DatasetBuilder`` takes tables and visits in any order and spills the visits to disk by partition. ``finish`` then
writes events, histories, truth and training rows. All files are written to a temporary directory beside the final one,
which is renamed at the end, so a dataset is either complete or not there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.console.errors import UserError, failure_reason
from trainer.data.format import history as histories
from trainer.data.format import shards, storage, validation
from trainer.data.format.dataset_files import record_checksums
from trainer.data.format.feature_join import TABLE_OF, FeatureJoin
from trainer.data.format.id_index import IdIndex
from trainer.data.format.schema import DOMAINS, EVENT_COLUMNS, DatasetSpec, IdSpace, visit_schema
from trainer.data.format.segments import DatasetSegments
from trainer.data.format.sorting import stable_order, time_order
from trainer.data.format.validation import Columns
from trainer.data.format.visit_events import behaviour_bits, derive_events, event_codes, event_names, event_table
from trainer.data.writing.duplicates import DuplicateRule
from trainer.data.writing.partition_spill import BatchFile, Spill
from trainer.data.writing.text_writer import TextWriter
from trainer.data.writing.training_rows import assemble

Progress = Callable[[str, int, int], None]
"""Called with the current task, the amount that is done, and the total."""

_OTHER_TABLES = ("segments", "comments")

# No delta encoding: fastparquet reads differences of 2^28 and more wrong, without an error.
_EVENTS_PARQUET = {
    "use_dictionary": ["user_id", "author_id", "item_id", "event"],
    "compression": "zstd",
    "compression_level": 1,
    "write_statistics": ["time_ms"],
}
# Many factors have few values, or belong to an item or a user.
_FACTORS_PARQUET = {"compression": "zstd", "compression_level": 1, "write_statistics": ["request_ms"]}
# Probabilities are random to a compressor.
_TRUTH_PARQUET = {
    "use_dictionary": ["user_id"],
    "compression": {name: "zstd" for name in ("visit_id", "user_id", "request_ms")},
    "write_statistics": ["request_ms"],
}


class DatasetBuilder:
    """Builds a dataset directory.

    Use the builder as a context manager: an exit without ``finish`` removes all files. The memory that it needs is
    bounded by the largest partition, the tables of users, authors and items, and the distinct keys of the statistics.

    Args:
        out: directory to create; it must not exist.
        spec: description of the dataset; ``finish`` fills in ``ids``, ``span_ms``, ``rows``, ``exposures`` and
            ``events``.
        rows_per_record: largest number of rows of a record of the training shards.
        records_per_shard: largest number of records of a shard.
        duplicates: rule for visits that were added twice. ``spec.extra`` then gets ``duplicate_lines``, the number of
            lines, dropped or kept, that repeat an earlier one in all columns; ``conflicting_visits_dropped``, the
            number of visits that were dropped and have other values than the kept one; and ``duplicates_dropped``, the
            number of all lines that were dropped.

    Raises:
        UserError: ``out`` exists or cannot be created, or the description is inconsistent.
    """

    def __init__(
        self,
        out: str | Path,
        spec: DatasetSpec,
        *,
        rows_per_record: int = 1024,
        records_per_shard: int = 256,
        duplicates: DuplicateRule | None = None,
    ) -> None:
        validation.check_spec(spec, histories.MAX_BEHAVIOURS)
        if storage.is_remote(out):
            raise UserError(f"{out}: datasets can only be built on a local disk; build it there and copy the directory")
        self._out = Path(out)
        if self._out.exists():
            raise UserError(f"{out}: exists already; choose another directory or remove it")
        # Beside the final directory: a rename is atomic only within one file system.
        self._tmp_path = self._out.with_name(f"{self._out.name}.partial-{os.getpid()}")
        self._work = self._tmp_path / "work"
        self._spec = spec
        self._record_limits = {"rows_per_record": rows_per_record, "records_per_shard": records_per_shard}
        self._duplicates = duplicates
        self._repeated_visits = self._repeated_lines = 0
        self._join = FeatureJoin(spec)
        self._tables: dict[str, pq.ParquetWriter] = {}
        self._spills: dict[str, Spill] = {}
        self._factors: pa.Schema | None = None
        self._texts = TextWriter(self._tmp_path)
        self._ids = {name: IdIndex() for name in ("user", "author", "item")}
        with self._writing():
            self._work.mkdir(parents=True)

    def __enter__(self) -> DatasetBuilder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def table(self, name: str, table: pa.Table) -> None:
        """Add lines to the table ``users``, ``authors``, ``items``, ``segments`` or ``comments``.

        ``users``, ``authors`` and ``items`` have a column ``user_id``, ``author_id`` or ``item_id`` and one for each of
        their side and dense features; other columns are stored unchanged. A table can be added in several parts with
        the same columns. Features of ids that visits name but the table does not have are 0.

        Raises:
            UserError: the table is unknown, or a column is missing or has a bad value.
        """
        owner = {table_name: owner for owner, table_name in TABLE_OF.items()}.get(name)
        if owner is None and name not in _OTHER_TABLES:
            raise UserError(
                f"{name!r} is not a table of a dataset; tables are {', '.join((*TABLE_OF.values(), *_OTHER_TABLES))}"
            )
        with self._writing():
            if owner is not None:
                self._ids[owner].add(self._join.add(owner, table))
            if name not in self._tables:
                self._tables[name] = pq.ParquetWriter(self._tmp_path / f"{name}.parquet", table.schema)
            elif table.schema != self._tables[name].schema:
                raise UserError(f"{name}: the parts of a table must have the same columns")
            self._tables[name].write_table(table)

    def folder(self, name: str) -> Path:
        """Create and return a folder of the dataset for other files of the source, such as ``embeddings/items``."""
        folder = self._tmp_path / name
        with self._writing():
            folder.mkdir(parents=True)
        return folder

    def segments_hash(self) -> str:
        """Complete the tables ``segments`` and ``items``, and return the hash of all segments for their vectors.

        Raises:
            UserError: a table is missing, or the segments have no times.
        """
        with self._writing():
            for name in ("segments", "items"):
                self._tables[name].close()
            # Read back as a reader of the vectors will read it, so that both have the same hash.
            segments = DatasetSegments.read(str(self._tmp_path), embedded=False)
            return segments.hash(np.arange(len(segments)))

    def visits(self, table: pa.Table) -> None:
        """Add visits (``schema.visit_schema``) of any users, in any order.

        Raises:
            UserError: a column is missing or a value is not possible; the message gives column, row and value.
        """
        schema = visit_schema(self._spec)
        optional = frozenset(name for name in schema.names if name.startswith("value_"))
        with self._writing():
            columns = validation.columns_of(table, schema, "visits", optional)
            validation.check_visits(self._spec, columns)
            self._spill("visits", schema).add(columns)

    def events(self, table: pa.Table) -> None:
        """Add events (``schema.EVENT_COLUMNS``) of any users; events of one millisecond keep the order of addition.

        If this method is never called, the events are derived from the visits. Otherwise all events must be added here.

        Raises:
            UserError: a column is missing, or an event has an unknown name or a negative id or time.
        """
        self._add_events("events", table)

    def repeats(self, table: pa.Table) -> None:
        """Add events that the visits do not contain: behaviours after the first one of their kind in a visit.

        Raises:
            UserError: the errors of ``events``.
        """
        self._add_events("repeats", table)

    def count_repeated_lines(self, lines: int) -> None:
        """Count lines of a log that repeat an earlier one in all columns and that an importer dropped itself."""
        self._repeated_lines += lines

    def truth(self, table: pa.Table) -> None:
        """Add true probabilities: ``visit_id``, ``user_id``, ``request_ms`` and ``p_B`` for each behaviour B.

        Raises:
            UserError: a column is missing or unknown.
        """
        schema = pa.schema(
            [
                *((name, pa.int64()) for name in ("visit_id", "user_id", "request_ms")),
                *((f"p_{behaviour}", pa.float32()) for behaviour in self._spec.behaviours),
            ]
        )
        with self._writing():
            self._spill("truth", schema).add(validation.columns_of(table, schema, "truth"))

    def factors(self, table: pa.Table) -> None:
        """Add true factors: ``visit_id``, ``user_id``, ``request_ms``, ``context``, and a column of numbers for each.

        Raises:
            UserError: a column is missing, or a part has other columns than the first one.
        """
        kinds = {name: pa.int64() for name in ("visit_id", "user_id", "request_ms")} | {"context": pa.int8()}
        if self._factors is None:
            others = [name for name in table.column_names if name not in kinds]
            self._factors = pa.schema([*kinds.items(), *((name, pa.float32()) for name in others)])
        with self._writing():
            self._spill("factors", self._factors).add(validation.columns_of(table, self._factors, "factors"))

    def texts(self, name: str, table: pa.Table) -> None:
        """Add lines to a text table (``text_schema.SCHEMAS``); comments must be added before visits that name them.

        Raises:
            UserError: the table is unknown, or a column is missing or has a bad value.
        """
        with self._writing():
            self._texts.add(name, table)

    def text_truth(self, name: str, table: pa.Table) -> None:
        """Add lines to another table of true parameters (``text_schema.TRUTHS``)."""
        with self._writing():
            self._texts.add_truth(name, table)

    def finish(self, progress: Progress | None = None, extra: Mapping[str, Any] | None = None) -> DatasetSpec:
        """Write the dataset and rename its directory to the final name.

        Args:
            progress: called as the work proceeds.
            extra: more facts for ``DatasetSpec.extra``.

        Returns:
            The description as written.

        Raises:
            UserError: there are no visits, a table is missing, or the disk is full.
        """
        report = progress or (lambda what, done, total: None)
        try:
            with self._writing():
                return self._finish(report, extra or {})
        finally:
            self._remove()

    def _finish(self, report: Progress, extra: Mapping[str, Any]) -> DatasetSpec:
        """Write the files of the dataset; see :meth:`finish`."""
        if "visits" not in self._spills:
            raise UserError(f"{self._out}: there are no visits to build a dataset from")
        if {"events", "repeats"} <= self._spills.keys():
            raise UserError(
                f"{self._out}: both events and repeats were added; add all events, or only the repeats of the visits"
            )
        self._join.check()
        for writer in self._tables.values():
            writer.close()
        self._texts.finish()
        for spill in self._spills.values():
            spill.flush()
        truth = ["truth"] if {"truth", "factors"} & self._spills.keys() else []
        for folder in ("events", *truth, histories.FOLDER, shards.FOLDER):
            (self._tmp_path / folder).mkdir(exist_ok=True)

        spec = self._spec
        totals = _Totals()
        history = histories.HistoryWriter(self._tmp_path / histories.FOLDER)
        with BatchFile(self._work / "exposures.arrow") as sorted_exposures:
            for partition in range(spec.partitions):
                report("sorting visits", partition, spec.partitions)
                sorted_exposures.append(self._sort_partition(partition, history, totals))
            report("sorting visits", spec.partitions, spec.partitions)
        # Memory-mapped: the next pass goes through all partitions at once.
        exposures = sorted_exposures.read()
        history.close()

        writers = [
            shards.ShardWriter(self._tmp_path / shards.FOLDER, partition, **self._record_limits)
            for partition in range(spec.partitions)
        ]
        assemble(spec, self._join, exposures, writers, lambda done, total: report("writing rows", done, total))
        for shard_writer in writers:
            shard_writer.close()

        if self._duplicates is not None:
            dropped = self._spills["visits"].rows - totals.exposures
            extra = {
                **extra,
                "duplicate_lines": self._repeated_visits + self._repeated_lines,
                "conflicting_visits_dropped": max(dropped - self._repeated_visits, 0),
                "duplicates_dropped": dropped + self._repeated_lines,
            }
        spec = replace(
            spec,
            ids={name: IdSpace(len(index), int(index.ids.max(initial=-1))) for name, index in self._ids.items()},
            span_ms=(totals.first_ms, totals.last_ms),
            rows=sum(len(part["visit_id"]) for part in exposures),
            exposures=totals.exposures,
            events=totals.events,
            extra={**spec.extra, **extra},
        )
        shutil.rmtree(self._work)
        (self._tmp_path / "dataset.json").write_text(spec.to_json())
        # The files are read back from the page cache, so this also finds a file that was not written as it was meant.
        record_checksums(self._tmp_path, lambda done, total: report("computing checksums", done, total))
        os.rename(self._tmp_path, self._out)
        return spec

    def _sort_partition(self, partition: int, history: histories.HistoryWriter, totals: _Totals) -> Columns:
        """Write events, history and truth of a partition, and return its exposures that become training rows."""
        visits = self._spills["visits"].pop(partition)
        if self._duplicates is not None:
            # All visits of a user are in one partition, so duplicates are found within it.
            visits, exact = self._duplicates.apply(visits)
            self._repeated_visits += exact
        totals.exposures += len(visits["visit_id"])
        order = time_order(visits["request_ms"], visits["visit_id"])
        visits = {name: np.take(column, order) for name, column in visits.items()}
        for name, index in self._ids.items():
            index.add(visits[f"{name}_id"])
        totals.span(visits["request_ms"])
        totals.events += self._write_events(partition, visits)
        self._write_truth(partition)

        bits = behaviour_bits(self._spec, visits)
        # Histories hold only visits that were watched or had a behaviour.
        kept = np.flatnonzero((visits["play_ms"] > 0) | (bits != 0))
        entry = {**visits, "bits": bits, "known_ms": visits["exit_ms"]}
        names = ("user_id", "domain", "item_id", "author_id", "request_ms", "play_ms", "bits", "known_ms")
        history.append({name: entry[name][kept] for name in names} | {"tag": self._join.tags(visits["item_id"][kept])})

        candidates = [DOMAINS.index(name) for name in self._spec.candidates]
        shown = np.flatnonzero(np.isin(visits["domain"], candidates))
        rows = {name: visits[name][shown] for name in ("visit_id", "user_id", "author_id", "item_id", "request_ms")}
        rows["domain"] = visits["domain"][shown].astype(np.uint8)
        rows["emit_ms"] = visits["exit_ms"][shown]
        rows["bits"] = bits[shown]
        rows.update({name: visits[name][shown] for name in validation.context_features(self._spec)})
        return rows

    def _add_events(self, name: str, table: pa.Table) -> None:
        """Check events, replace their names by codes, and spill them under ``name``."""
        at = EVENT_COLUMNS.get_field_index("event")
        stored = EVENT_COLUMNS.set(at, pa.field("event", pa.int8()))
        with self._writing():
            if "event" in table.column_names:
                code = event_codes(self._spec, table.column("event"))
                if (code < 0).any():
                    row = int(np.argmax(code < 0))
                    accepted = ", ".join(event_names(self._spec))
                    raise UserError(
                        f"{name}: column 'event' is {table['event'][row]} in row {row}; known events are {accepted}"
                    )
                table = table.set_column(table.column_names.index("event"), "event", [pa.array(code)])
            columns = validation.columns_of(table, stored, name)
            validation.check_ids(columns, ("user_id", "author_id", "item_id", "visit_id", "time_ms"), name)
            self._spill(name, stored).add(columns)

    def _write_events(self, partition: int, visits: Columns) -> int:
        """Write the events of a partition, and return their number."""
        added = {name: self._spills[name].pop(partition) for name in ("events", "repeats") if name in self._spills}
        if "events" in added:
            order = stable_order(added["events"]["time_ms"])
            parts = iter([{name: np.take(column, order) for name, column in added["events"].items()}])
        else:
            parts = derive_events(self._spec, visits, added.get("repeats"))
        count = 0
        file = self._tmp_path / "events" / f"part-{partition:05d}.parquet"
        with pq.ParquetWriter(file, EVENT_COLUMNS, **_EVENTS_PARQUET) as writer:
            for events in parts:
                writer.write_table(event_table(self._spec, events))
                count += len(events["event"])
        return count

    def _write_truth(self, partition: int) -> None:
        """Write the true probabilities and factors of a partition, if there are any."""
        for name, file, settings in (("truth", "part", _TRUTH_PARQUET), ("factors", "factors", _FACTORS_PARQUET)):
            if name in self._spills:
                truth = self._spills[name].pop(partition)
                order = time_order(truth["request_ms"], truth["visit_id"])
                table = pa.table({name: np.take(column, order) for name, column in truth.items()})
                pq.write_table(table, self._tmp_path / "truth" / f"{file}-{partition:05d}.parquet", **settings)

    def _spill(self, name: str, schema: pa.Schema) -> Spill:
        """Return the spill for rows of one kind; it is created at the first call."""
        if name not in self._spills:
            self._spills[name] = Spill(self._work / name, schema, self._spec.partitions)
        return self._spills[name]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn errors of the file system into a ``UserError``, and remove all files after any error."""
        try:
            yield
        except OSError as error:
            self._remove()
            reason = failure_reason(error)
            raise UserError(f"{self._out}: cannot be written ({reason})") from error
        except BaseException:
            self._remove()
            raise

    def _remove(self) -> None:
        """Close and delete all files; does nothing after :meth:`finish` has succeeded."""
        for writer in (*self._tables.values(), self._texts):
            # If the disk is full, closing fails again; the content of the file no longer matters.
            with suppress(OSError):
                writer.close()
        shutil.rmtree(self._tmp_path, ignore_errors=True)


class _Totals:
    """Sums over the partitions while they are written."""

    def __init__(self) -> None:
        self.events = 0
        self.exposures = 0
        self.first_ms = 0
        self.last_ms = 0
        self._any = False

    def span(self, request_ms: np.ndarray) -> None:
        """Extend the first and last request time by those of a partition, given in time order."""
        if len(request_ms):
            first, last = int(request_ms[0]), int(request_ms[-1])
            self.first_ms = min(self.first_ms, first) if self._any else first
            self.last_ms = max(self.last_ms, last)
            self._any = True
