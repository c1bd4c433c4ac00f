"""Verification of a whole dataset: every file against its checksum, and the tables against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.console.errors import UserError, one_line
from trainer.console.text_table import size_text
from trainer.data.format import storage, validation
from trainer.data.format.content_vectors import ContentVectors
from trainer.data.format.dataset import Dataset
from trainer.data.format.dataset_files import DatasetFiles, list_files, list_vector_tables, record_checksums
from trainer.data.format.feature_join import TABLE_OF, FeatureJoin
from trainer.data.format.parquet_files import open_table, read_table
from trainer.data.format.schema import DOMAINS, EVENT_COLUMNS, KINDS, UNKNOWN, DatasetSpec, Rows, partition_of
from trainer.data.format.text_schema import FOLDER as TEXTS
from trainer.data.format.text_schema import SCHEMAS, read_texts
from trainer.data.format.visit_events import event_codes
from trainer.runtime.checksums import CHECKSUMS

Report = Callable[[str, int, int], None]
"""Called with the current task, the amount that is done, and the total."""

_CHECKED_ENTRIES = 1 << 20
_NUMBERS = pa.schema([field for field in EVENT_COLUMNS if field.name != "event"])


@dataclass(frozen=True)
class Verification:
    """Result of the verification of a dataset.

    Attributes:
        path: of the dataset.
        files: number of files whose checksums were compared.
        bytes: their size.
        has_checksums: False for a dataset of an earlier version, of which only the consistency was checked.
        unlisted: files that are there and have no checksum.
        problems: one line for each damaged file.
    """

    path: str
    files: int
    bytes: int
    has_checksums: bool
    unlisted: tuple[str, ...]
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the result as a value for JSON."""
        return {**asdict(self), "ok": not self.problems}

    def __str__(self) -> str:
        lines = [f"{self.path}: {self._verdict()}"]
        if not self.has_checksums:
            lines.append(
                f"there are no checksums to compare: {self.path} has no {CHECKSUMS} (an earlier version made it); "
                f"write one: limelight data verify {self.path} --record"
            )
        elif self.unlisted:
            more = f" and {len(self.unlisted) - 3} more" if len(self.unlisted) > 3 else ""
            lines.append(f"without a checksum, so not compared: {', '.join(self.unlisted[:3])}{more}")
        return "\n".join(lines)

    def _verdict(self) -> str:
        if self.problems:
            return f"{len(self.problems)} problem" + "s" * (len(self.problems) > 1)
        if not self.has_checksums:
            return "its files fit together"
        return f"{self.files:,} files, {size_text(self.bytes)}, all as they were written"


def verify_dataset(path: str, report: Report) -> Verification:
    """Read everything in a dataset: compare checksums, and then check that the tables fit together.

    Args:
        path: dataset, a directory or an fsspec URL.
        report: called as the work proceeds.

    Raises:
        UserError: there is no dataset at ``path``.
    """
    files = DatasetFiles(path)
    try:
        checksums = files.checksums or {}
    except UserError as error:
        return Verification(path, 0, 0, True, (), (str(error),))
    if files.checksums is None:
        # Without it a mistyped path would count as a dataset that is damaged.
        DatasetSpec.load(path)
    problems = list(_damaged_files(files, report))
    if not storage.is_remote(path):
        problems += _damaged_vectors(Path(path))
    if not problems:
        problems = list(_misfits(path, report))
    unlisted = () if storage.is_remote(path) else tuple(n for n in list_files(Path(path)) if n not in checksums)
    size = sum(entry.bytes for entry in checksums.values())
    return Verification(path, len(checksums), size, files.checksums is not None, unlisted, tuple(problems))


def record_dataset(path: str, report: Report) -> Verification:
    """Check that the tables of a dataset fit together, and record sizes and checksums of its present files.

    Raises:
        UserError: there is no dataset at ``path``, it is on a URL, or its files do not fit together; then the recorded
            checksums stay as they were.
    """
    if storage.is_remote(path):
        raise UserError(f"{path}: checksums can only be recorded on a local disk; record them there and copy the files")
    directory = Path(path)
    if not (directory / "dataset.json").exists():
        DatasetSpec.load(path)
    manifest = directory / CHECKSUMS
    before = manifest.read_bytes() if manifest.exists() else None
    kept = False
    try:
        # Readers compare with the recorded checksums, so the new ones come first, and go if the check fails.
        record_checksums(directory, lambda done, total: report("computing checksums", done, total))
        result = verify_dataset(path, report)
        if result.problems:
            raise UserError(f"{result.problems[0]} (nothing was recorded)")
        kept = True
    except OSError as error:
        raise UserError(f"{manifest}: cannot be written ({one_line(error)})") from None
    finally:
        if not kept and before is not None:
            manifest.write_bytes(before)
        elif not kept:
            manifest.unlink(missing_ok=True)
    return result


def _damaged_files(files: DatasetFiles, report: Report) -> Iterator[str]:
    """Yield a line for each file that differs from its recorded size or checksum."""
    checksums = files.checksums or {}
    total, done = sum(entry.bytes for entry in checksums.values()), 0
    wrong_size: set[str] = set()
    for name, problem in files.list_wrong_sizes():
        wrong_size.add(name)
        yield problem

    def advance(size: int) -> None:
        nonlocal done
        done += size
        report("comparing checksums", done, total)

    for name in checksums:
        if name in wrong_size:
            continue
        try:
            files.verify(name, advance=advance)
        except UserError as error:
            yield str(error)


def _damaged_vectors(directory: Path) -> Iterator[str]:
    """Yield a line for each damaged embedding table."""
    for table in list_vector_tables(directory):
        try:
            ContentVectors.open(table)
        except UserError as error:
            yield str(error)


def _misfits(path: str, report: Report) -> Iterator[str]:
    """Yield a line for each file whose content does not fit to the others; the first one of each file."""
    try:
        spec = DatasetSpec.load(path)
    except UserError as error:
        yield str(error)
        return
    names = DatasetFiles(path).names()
    if spec.rows or any(name.startswith("rows/") for name in names):
        try:
            data = Dataset.open(path)
        except UserError as error:
            yield str(error)
            return
        yield from _wrong_rows(data, report)
        yield from _wrong_histories(data)
    checks: list[Callable[[], None]] = []
    if any(name.startswith("events/") for name in names):
        checks.append(partial(_check_events, path, spec))
    checks += [
        partial(_check_features, path, spec, owner) for owner in TABLE_OF if f"{TABLE_OF[owner]}.parquet" in names
    ]
    checks += [partial(_check_texts, path, name) for name in SCHEMAS if f"{TEXTS}/{name}.parquet" in names]
    for done, check in enumerate(checks):
        report("reading tables", done, len(checks))
        try:
            check()
        except UserError as error:
            yield str(error)
    report("reading tables", len(checks), len(checks))


def _wrong_rows(data: Dataset, report: Report) -> Iterator[str]:
    """Yield a line for each shard with a record that is damaged or has values that no writer makes."""
    spec, store, done = data.spec, data.store, 0
    for partition in range(spec.partitions):
        index = store.records(partition)
        damaged: set[str] = set()
        for record in range(len(index.rows)):
            shard = store.shard_of(partition, record)
            if shard not in damaged:
                problem = None
                try:
                    rows = store.read(partition, record)
                    assert rows is not None, "a store that does not skip corrupt records raises an error instead"
                    problem = _wrong_values(spec, partition, rows)
                except UserError as error:
                    yield str(error)
                    damaged.add(shard)
                if problem is not None:
                    yield f"{shard}: damaged, record {record} {problem}; restore the dataset, or make it again"
                    damaged.add(shard)
            done += int(index.rows[record])
            report("reading rows", done, spec.rows)


def _wrong_values(spec: DatasetSpec, partition: int, rows: Rows) -> str | None:
    """Return what is wrong with the rows of a record, or None."""
    side = np.array([feature.rows for feature in spec.side], np.int64)
    conditions = {
        "has users of another partition": partition_of(rows["user_id"], spec.partitions) != partition,
        "is not in the order of emission": np.append(False, np.diff(rows["emit_ms"]) < 0)[: len(rows["emit_ms"])],
        "is emitted before it is requested": rows["emit_ms"] < rows["request_ms"],
        "has an unknown domain": rows["domain"] >= len(DOMAINS),
        "has an unknown kind of row": rows["kind"] >= len(KINDS),
        "has a label or mask that is not 0 or 1": (rows["label"] > 1).any(1) | (rows["mask"] > 1).any(1),
        "has a side feature out of its range": ((rows["side"] < UNKNOWN) | (rows["side"] >= side)).any(1),
        "has dense features that are not finite": ~np.isfinite(rows["dense"]).all(1),
        "has statistics that are no counts": ~(np.isfinite(rows["stat"]) & (rows["stat"] >= 0)).all(1),
    }
    return next((what for what, where in conditions.items() if where.any()), None)


def _wrong_histories(data: Dataset) -> Iterator[str]:
    """Yield a line for each column of the histories with values that no writer makes."""
    spec, histories = data.spec, data.histories
    longest = int(histories.lengths()[1].sum(axis=1).max(initial=0))
    tags = next((side.rows for side in spec.side if side.name == spec.tag), 1)
    limits = {
        "bits": (0, 1 << len(spec.behaviours)),
        "tag": (0, tags),
        "ordinal": (0, longest),
        "item_id": (0, None),
        "author_id": (0, None),
        "request_ms": (spec.span_ms[0], spec.span_ms[1] + 1),
        "play_ms": (0, None),
    }
    for name, (low, high) in limits.items():
        column = histories.column(name)
        for first in range(0, len(column), _CHECKED_ENTRIES):
            piece = column[first : first + _CHECKED_ENTRIES]
            bad = (piece < low) | (piece >= high if high is not None else False)
            if bad.any():
                entry = int(np.argmax(bad))
                problem = f"damaged, entry {first + entry:,} is {piece[entry]}; restore the dataset, or make it again"
                yield f"{histories.file_of(name)}: {problem}"
                break


def _check_events(path: str, spec: DatasetSpec) -> None:
    """Check types, times and users of all events, and their number."""
    files, count = DatasetFiles(path), 0
    for partition in range(spec.partitions):
        name = f"events/part-{partition:05d}.parquet"
        with open_table(files, name) as opened:
            if opened.schema_arrow.names != EVENT_COLUMNS.names:
                raise UserError(f"{storage.join(path, name)}: its columns are not {', '.join(EVENT_COLUMNS.names)}")
            for batch in opened.iter_batches(1 << 16):
                _check_event_batch(spec, partition, batch, storage.join(path, name))
                count += batch.num_rows
    if spec.events and count != spec.events:
        raise UserError(
            f"{storage.join(path, 'events')}/*.parquet: damaged, they have {count:,} events in all, and dataset.json "
            f"{spec.events:,}; restore the dataset, or make it again"
        )


def _check_event_batch(spec: DatasetSpec, partition: int, batch: pa.RecordBatch, file: str) -> None:
    """Check some events of a partition, columns of ``EVENT_COLUMNS``. They may be in the order of their arrival.

    Raises:
        UserError: an event has a value that no writer makes; names ``file``.
    """
    columns = validation.columns_of(
        pa.table([batch.column(name) for name in _NUMBERS.names], _NUMBERS.names), _NUMBERS, file
    )
    validation.check_ids(columns, ("user_id", "author_id", "item_id", "visit_id"), file)
    validation.check_finite(columns, ("value",), file)
    code = event_codes(spec, pa.chunked_array([batch.column("event")]))
    domain = columns["domain"]
    elsewhere = partition_of(columns["user_id"], spec.partitions) != partition
    conditions = {
        "event": ("is not known", code < 0),
        "domain": ("is not known", (domain < 0) | (domain >= len(DOMAINS))),
        "user_id": (f"is not of a user of partition {partition}", elsewhere),
    }
    for name, (what, where) in conditions.items():
        if where.any():
            raise UserError(f"{file}: damaged, {name} of an event {what}; restore the dataset, or make it again")


def _check_features(path: str, spec: DatasetSpec, owner: str) -> None:
    """Check that a table of users, authors or items has one line for each id, and features in their range."""
    name = f"{TABLE_OF[owner]}.parquet"
    try:
        FeatureJoin(spec).add(owner, read_table(DatasetFiles(path), name))
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(path) else f"{storage.join(path, name)}: damaged ({text})") from None


def _check_texts(path: str, name: str) -> None:
    """Check that a text table has its columns and no nulls, and no id twice."""
    ids = read_texts(path, name).column(0)
    if name != "segments" and len(pc.unique(ids)) != len(ids):
        raise UserError(f"{storage.join(path, f'{TEXTS}/{name}.parquet')}: damaged, an id comes twice")
