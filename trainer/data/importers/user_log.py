"""Reader of a user's own log that yields canonical columns, file after file in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NoReturn

import numpy as np
import pyarrow as pa

from trainer.console.errors import UserError
from trainer.data.format.schema import DOMAINS
from trainer.data.format.times import EARLIEST_MS, accepted_times, times_ms
from trainer.data.format.validation import Columns
from trainer.data.importers import field_parsers
from trainer.data.importers.category_codes import vocabulary
from trainer.data.importers.columns import LONGEST_MS, ColumnBatch, read_column_batches
from trainer.data.importers.log_files import LogFile
from trainer.data.importers.mapping import EventMapping
from trainer.data.importers.null_markers import NullMarkers
from trainer.data.importers.table_files import raise_bad_value
from trainer.data.importers.visit_assembly import EventCodes

MOST_CATEGORIES = 1_000_000
"""Most distinct values of a column that may become a category."""


def collect_vocabularies(
    files: tuple[LogFile, ...], side: tuple[str, ...], nulls: NullMarkers
) -> dict[str, tuple[str, ...]]:
    """Return the sorted distinct values of each category column over all files.

    Raises:
        UserError: a column is missing, or has more than ``MOST_CATEGORIES`` values.
    """
    values: dict[str, set[str]] = {name: set() for name in side}
    for file in files if side else ():
        for batch in read_column_batches(file.path, dict.fromkeys(side), nulls=nulls, partition=file.partition):
            for name in side:
                values[name] |= batch.categories(name)
                if len(values[name]) > MOST_CATEGORIES:
                    raise UserError(
                        f"{file.path}: column {name!r} has more than {MOST_CATEGORIES:,} values, too many for `side`"
                    )
    return {name: vocabulary(found) for name, found in values.items()}


class IdColumns:
    """Converter of id columns to int64: whole numbers, or hashed text where ``hash_ids`` names the column."""

    def __init__(self, mapping: EventMapping) -> None:
        self._hashes = {name: field_parsers.IdHash() for name in mapping.hash_ids}

    def convert(self, name: str, batch: ColumnBatch, column: str) -> np.ndarray:
        """Return the ids of a part of a column; ``name`` is the canonical name, ``column`` the name in the file."""
        if name in self._hashes:
            return batch.hashed_ids(column, self._hashes[name])
        return batch.ids(column, name)

    @property
    def collisions(self) -> dict[str, int]:
        """Numbers of texts that share an id with another text, by hashed column, so far."""
        return {name: hashing.collisions for name, hashing in self._hashes.items()}


class UserLog:
    """Reader of the files of a log.

    Args:
        files: files in reading order.
        mapping: mapping of their columns.
        ids: converter of id columns.
        vocabularies: values of the context's side features.
    """

    def __init__(
        self,
        files: tuple[LogFile, ...],
        mapping: EventMapping,
        ids: IdColumns,
        vocabularies: dict[str, tuple[str, ...]],
    ) -> None:
        self.rows = 0
        self._files = files
        self._mapping = mapping
        self._ids = ids
        self._vocabularies = vocabularies
        self._first_rows: list[int] = []
        # only the columns that the mapping uses are read
        self._types: dict[str, pa.DataType | None] = dict.fromkeys(mapping.log_columns())
        pairs = [(canonical, log_name) for canonical, log_names in mapping.event_names() for log_name in log_names]
        self._event_names = [log_name for _, log_name in pairs]
        order = [canonical for canonical, _ in mapping.event_names()]
        self._event_codes = np.array([order.index(canonical) for canonical, _ in pairs], np.int8)
        self._ignored = order.index("ignore")

    def batches(self, report: Callable[[int, int], None]) -> Iterator[Columns]:
        """Yield the lines as columns, batch by batch.

        Columns: ``row`` (running number over all files), ``user_id, author_id, item_id, visit_id`` (the running number
        if the log has no visit ids), ``domain``, ``time_ms``, and the context's features. ``layout = "events"`` adds
        ``code`` and ``value``; ``layout = "exposures"`` adds ``play_ms``, ``happened_B`` (value of the outcome) and, if
        the mapping names such a column, ``delay_B``.

        Args:
            report: callback that gets the bytes read and the total bytes.

        Raises:
            UserError: a column is missing or a value is bad; names file, row, column and value.
        """
        sizes = [file.path.stat().st_size for file in self._files]
        for number, file in enumerate(self._files):
            report(sum(sizes[:number]), sum(sizes))
            self._first_rows.append(self.rows)
            latest = EARLIEST_MS
            batches = read_column_batches(
                file.path, self._types, nulls=self._mapping.null_markers(), partition=file.partition
            )
            for batch in batches:
                columns = self._columns(batch, latest)
                latest = int(columns["time_ms"][-1])
                self.rows += batch.rows
                if "code" in columns:
                    kept = columns["code"] != self._ignored
                    columns = {name: column[kept] for name, column in columns.items()}
                yield columns
        report(sum(sizes), sum(sizes))

    def raise_bad_value(self, row: int, column: str, value: object, accepted: str) -> NoReturn:
        """Raise the error of a bad value in the line with running number ``row``.

        Raises:
            UserError: always.
        """
        file, number = self.place(row)
        raise_bad_value(file.path, number, column, value, accepted)

    def place(self, row: int) -> tuple[LogFile, int]:
        """Return the file and the number in it, from 1, of the line with running number ``row``."""
        number = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return self._files[number], row - self._first_rows[number] + 1

    def _columns(self, batch: ColumnBatch, latest_ms: int) -> Columns:
        """Return the canonical columns of a batch; ``latest_ms`` is the time of the line before it in the file."""
        mapping, names = self._mapping, self._mapping.columns
        columns: Columns = {"row": np.arange(self.rows, self.rows + batch.rows)}
        id_columns = {"user_id": names.user_id, "author_id": names.author_id, "item_id": names.item_id}
        id_columns |= {} if names.visit_id is None else {"visit_id": names.visit_id}
        for name, column in id_columns.items():
            columns[name] = self._ids.convert(name, batch, column)
        columns.setdefault("visit_id", columns["row"])
        columns["time_ms"] = self._times(batch, latest_ms)
        columns["domain"] = self._domain(batch)
        for name in mapping.features.context.side:
            columns[name] = batch.codes(name, self._vocabularies[name])
        for name in mapping.features.context.dense:
            columns[name] = batch.small_numbers(name)
        if mapping.layout == "events":
            assert names.event is not None
            accepted = f"one of {', '.join(self._event_names)} (ignore others: events.ignore in the mapping)"
            known = batch.convert(names.event, partial(field_parsers.codes, names=self._event_names), accepted)
            columns["code"] = self._event_codes[known]
            columns["value"] = np.zeros(batch.rows)
            if names.value is not None:
                columns["value"] = batch.numbers(names.value)
                batch.require_float32(columns["value"], names.value)
                watched = np.where(columns["code"] == EventCodes.EXIT, columns["value"], 0)
                batch.require(
                    (watched >= 0) & (watched <= LONGEST_MS), names.value, "0 to 2^31 - 1 milliseconds for an exit"
                )
            return columns
        columns["play_ms"] = np.zeros(batch.rows, np.int64)
        if names.play_ms is not None:
            columns["play_ms"] = batch.milliseconds(names.play_ms)
        for name, behaviour in mapping.behaviours.items():
            assert behaviour.column is not None
            read = batch.small_numbers if name == "gift" else batch.numbers
            columns[f"happened_{name}"] = read(behaviour.column)
            if behaviour.delay is not None:
                columns[f"delay_{name}"] = batch.milliseconds(behaviour.delay)
        return columns

    def _times(self, batch: ColumnBatch, latest_ms: int) -> np.ndarray:
        """Return the times of a batch in milliseconds UTC, ``[rows] int64``.

        Raises:
            UserError: a time is bad, or it is earlier than the one before and the mapping forbids that.
        """
        mapping = self._mapping
        kind = batch.column(mapping.columns.time).type
        accepted = accepted_times(kind, f"{mapping.time_unit} (time_unit in the mapping)", mapping.timezone)
        read = partial(times_ms, unit=mapping.time_unit, timezone=mapping.timezone)
        times = batch.convert(mapping.columns.time, read, accepted)
        if mapping.out_of_order == "error":
            earlier = np.flatnonzero(np.diff(times, prepend=latest_ms) < 0)
            if len(earlier):
                accepted = 'no earlier than the line before; sort the file, or set out_of_order = "sort" in the mapping'
                batch.raise_bad_value(mapping.columns.time, int(earlier[0]), accepted)
        return times

    def _domain(self, batch: ColumnBatch) -> np.ndarray:
        """Return the domain of each line of a batch, ``[rows] int8``."""
        rule = self._mapping.domain
        if rule.column is None:
            return np.full(batch.rows, DOMAINS.index(rule.constant or ""), np.int8)
        values = {"video": rule.video, "live": rule.live}
        names = [name for domain in DOMAINS for name in values[domain]]
        accepted = f"one of {', '.join(names)} (domain.video and domain.live in the mapping)"
        known = batch.convert(rule.column, partial(field_parsers.codes, names=names), accepted)
        return np.repeat(np.arange(len(DOMAINS), dtype=np.int8), [len(values[domain]) for domain in DOMAINS])[known]
