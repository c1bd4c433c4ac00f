"""Importer of a log of your own, Parquet or CSV.

A TOML file maps the columns of the log. With ``layout = "exposures"`` a line is an exposure with its outcomes. With
``layout = "events"`` a line is one event (an exposure, an enter, a like, an exit ...), and visits are assembled from
the events (``visit_assembly.py``). All keys, with their defaults::

    layout = "exposures"             # or "events"
    name = "events"                  # of the dataset; also source = "" and licence = ""
    timezone = "UTC"                 # time zone of the calendar days, and of times without an offset
    files = "*"                      # pattern of the files in SRC; only .csv, .csv.gz and .parquet are read;
                                     # "**/*.parquet" for folders dt=2022-05-04, whose keys are columns, too
    time_unit = "ms"                 # unit of numeric times: "s", "ms", "us", "ns"; text times are ISO 8601
    out_of_order = "error"           # a time earlier than in the line before: "error" or "sort"
    orphans = "error"                # "events": an event without an earlier exposure: "error" or "drop" (and count)
    duplicates = "drop"              # lines that repeat an earlier one in all columns that are read: "drop" or "keep",
                                     # such as for gifts of one second; they are counted in any case
    hash_ids = []                    # columns of text ids, from user_id, author_id, item_id, visit_id; see below
    candidates = ["video", "live"]   # domains whose exposures become training rows
    statistics = [["user"], ["item"], ["author"], ["user", "author"]]
    tag = ""                         # side feature of items that histories store with every visit; empty: none

    [nulls]                          # texts that mean "no value"; an empty text always does
    values = ['\\N', "NULL", "null", "NA", "N/A", "n/a", "NaN", "nan", "None", "<NA>", "UNKNOWN"]
                                     # in categories, numbers and outcomes
    ids = ['\\N']                    # in columns of hash_ids: a user may be named NULL
    columns = {}                     # in single columns instead, such as {country = ["-"]}

    [columns]                        # canonical name = your column
    user_id = "uid"                  # required, as are author_id, item_id and time
    author_id = "anchor"
    item_id = "room"
    time = "ts"
    visit_id = "session"             # optional; of one visit in the whole log: checked
    play_ms = "watched"              # "exposures", optional: milliseconds watched
    event = "action"                 # "events": required
    value = "amount"                 # "events", optional: milliseconds watched for an exit, price for a gift

    [domain]                         # either constant or column
    constant = "live"
    column = "type"                  # with video = ["1"] and live = ["2", "3"]: the column's values as text

    [behaviours]                     # in label order; the behaviour named gift has a price
    like = {column = "is_like"}      # "exposures": happened if the value is above 0 or true
    click = {column = "clk", at = "start"}         # time of the behaviour: "start" or "end" of the watch (default)
    gift = {column = "price", delay = "gift_ms", applies = ["live"]}   # or a column of ms since the exposure
    share = {events = ["share", "repost"]}         # "events": the log's names for it

    [events]                         # "events": the log's names for events that are not behaviours
    exposure = ["show"]              # an exposure begins a visit; if no exposure is mapped, an enter does
    enter = ["enter"]
    exit = ["leave"]
    ignore = ["heartbeat"]           # any other name is an error

    [features]                       # columns that become features: categories (side) and numbers (dense)
    context = {side = ["tab"], dense = ["battery"]}                    # columns of the log
    user = {file = "users.csv", id = "uid", side = ["city"], dense = ["age"]}
                                     # likewise author and item; the path is relative to the mapping's folder

Ids are whole numbers, 0 or more. An item has one author and one domain in the whole log: number videos and rooms so
that they share no id. Columns of text ids must be named in ``hash_ids``: an id then becomes 63 bits of a
BLAKE2b hash. The number of texts that share an id with another text is written to ``extra.hash_collisions`` of
``dataset.json`` (n^2 / 2^64 are expected for n ids). The code of a side feature is 1 + the position in
``extra.vocabularies``; 0 means missing. ``docs/data.md`` says how values are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.data.format.id_index import IdIndex
from trainer.data.format.schema import (
    DOMAINS,
    EVENT_COLUMNS,
    VISIT_EVENTS,
    DatasetSpec,
    DenseFeature,
    SideFeature,
    SideOwner,
)
from trainer.data.format.validation import Columns
from trainer.data.importers.columns import read_column_batches
from trainer.data.importers.id_consistency import IdConsistency, line_hash
from trainer.data.importers.id_lookup import first_occurrences
from trainer.data.importers.log_files import LogFile, find_log_files
from trainer.data.importers.mapping import EventMapping, TableFeatures, load_mapping
from trainer.data.importers.null_markers import NullMarkers
from trainer.data.importers.scratch_dir import scratch_folder
from trainer.data.importers.user_log import IdColumns, UserLog, collect_vocabularies
from trainer.data.importers.visit_assembly import EventCodes, assemble_visits
from trainer.data.writing.builder import DatasetBuilder, Progress
from trainer.data.writing.duplicates import DuplicateRule, find_duplicates
from trainer.data.writing.partition_spill import Spill

Vocabularies = dict[str, tuple[str, ...]]


def import_events(
    src: str | Path, out: str | Path, mapping: str | Path, partitions: int = 8, progress: Progress | None = None
) -> DatasetSpec:
    """Build a dataset from a log.

    The log is read in blocks. Memory holds the categories, 32 to 56 bytes for each hashed id, with ``layout =
    "events"`` the events of one partition, and what the builder needs.

    Args:
        src: a ``.parquet``, ``.csv`` or ``.csv.gz`` file, or a folder of them, which are read in order of their names.
        out: the dataset to make; must not exist.
        mapping: the TOML file described above.
        partitions: number of partitions.
        progress: callback that gets the name of a phase, the work done and the total work.

    Returns:
        The description of the dataset.

    Raises:
        UserError: a mistake in the mapping (names file and key) or in the log (names file, row, column and value).
    """
    rules = load_mapping(mapping)
    report = progress or (lambda what, done, total: None)
    tables = {owner: Path(mapping).parent / table.file for owner, table in rules.features.tables().items()}
    found_files = find_log_files(Path(src), rules.files, {file.resolve() for file in tables.values()})
    files, nulls = found_files.read, rules.null_markers()
    context = collect_vocabularies(files, rules.features.context.side, nulls)
    by_owner = {
        owner: collect_vocabularies((LogFile(tables[owner], table.file, {}),), table.side, nulls)
        for owner, table in rules.features.tables().items()
    }
    ids = IdColumns(rules)
    log = UserLog(files, rules, ids, context)
    spec = _spec(rules, files, partitions, context, by_owner)
    whole_lines = rules.layout == "exposures"
    rule = DuplicateRule(
        "lines" if rules.duplicates == "drop" else "none", visit_ids=rules.columns.visit_id is not None
    )
    # Single events that repeat an earlier one are dropped before visits are assembled from them.
    builder_rule = rule if whole_lines else None
    with DatasetBuilder(out, spec, duplicates=builder_rule) as builder, scratch_folder(out) as folder:
        for owner, table in rules.features.tables().items():
            for part in _feature_table(tables[owner], owner, table, by_owner[owner], ids, nulls):
                builder.table(f"{owner}s", part)
        found: dict[str, Any] = {"orphans_dropped": 0}
        checks = _IdChecks(folder, rules)
        if not whole_lines:
            found = _import_single_events(log, rules, builder, spec, folder, report, checks)
        else:
            for lines in log.batches(lambda done, total: report("reading logs", done, total)):
                checks.add(lines)
                builder.visits(pa.table(_visits(lines, rules)))
            checks.finish(log)
        found |= {"log_rows": log.rows, "hash_collisions": ids.collisions}
        found |= {"duplicates": rules.duplicates, "files_left_out": len(found_files.left_out)}
        found["first_file_left_out"] = next(iter(found_files.left_out), None)
        return builder.finish(progress, found)


class _IdChecks:
    """Checks of the ids of a log that later stages rely on.

    An item has one author and one domain. With ``layout = "events"`` a visit has one user, author, item and domain;
    with ``layout = "exposures"`` it has one line, apart from exact repetitions of it.
    """

    def __init__(self, folder: Path, rules: EventMapping) -> None:
        self._mapping = rules
        self._whole_lines = rules.layout == "exposures"
        self._checks = {"item_id": IdConsistency(folder / "items", "item_id", ("author_id", "domain"))}
        if rules.columns.visit_id is not None:
            same = ("user_id", "item_id", "author_id", "domain", *(("time_ms", "line") if self._whole_lines else ()))
            self._checks["visit_id"] = IdConsistency(folder / "visits", "visit_id", same)

    def add(self, lines: Columns) -> None:
        """Add lines of the log."""
        columns = lines
        if "visit_id" in self._checks and self._whole_lines:
            columns = {**lines, "line": line_hash(lines)}
        for check in self._checks.values():
            check.add(columns)

    def finish(self, log: UserLog) -> None:
        """Check all lines.

        Raises:
            UserError: an id stands for two things; names file, row and column, and the other line.
        """
        for name, check in self._checks.items():
            found = check.find()
            if found is None:
                continue
            file, row = log.place(found.earlier)
            here, there = found.value, found.other
            if found.column == "line":
                differ = "with other outcomes or features"
            elif found.column == "domain":
                differ = f"with domain {DOMAINS[there]} (here {DOMAINS[here]})"
            else:
                differ = f"with {found.column} {there} (here {here})"
            what = "an id of one visit" if name == "visit_id" else "an id of one item, with one author and one domain"
            file_column, id_here = getattr(self._mapping.columns, name), found.id
            log.raise_bad_value(found.row, file_column, id_here, f"{what}; row {row} of {file.name} has it {differ}")


def _spec(
    rules: EventMapping,
    files: tuple[LogFile, ...],
    partitions: int,
    context: Vocabularies,
    by_owner: dict[str, Vocabularies],
) -> DatasetSpec:
    """Return the content of ``dataset.json`` before the log is read."""
    side, dense = [], []
    owners: tuple[SideOwner, ...] = ("user", "author", "item")
    for owner in owners:
        table = rules.features.tables().get(owner)
        if table is not None:
            side += [SideFeature(name, owner, len(by_owner[owner][name]) + 1) for name in table.side]
            dense += [DenseFeature(name, owner) for name in table.dense]
    side += [SideFeature(name, "context", len(context[name]) + 1) for name in rules.features.context.side]
    dense += [DenseFeature(name, "context") for name in rules.features.context.dense]
    vocabularies = {name: list(known) for part in (*by_owner.values(), context) for name, known in part.items()}
    return DatasetSpec(
        name=rules.name,
        source=rules.source,
        licence=rules.licence,
        partitions=partitions,
        timezone=rules.timezone,
        behaviours=tuple(rules.behaviours),
        applies={name: behaviour.applies for name, behaviour in rules.behaviours.items()},
        candidates=rules.candidates,
        side=tuple(side),
        dense=tuple(dense),
        statistics=rules.statistics,
        tag=rules.tag,
        extra={"files": [file.name for file in files], "vocabularies": vocabularies},
    )


def _feature_table(
    file: Path, owner: str, rules: TableFeatures, vocabularies: Vocabularies, ids: IdColumns, nulls: NullMarkers
) -> Iterator[pa.Table]:
    """Yield the table of users, authors or items, batch by batch."""
    known = IdIndex()
    for batch in read_column_batches(file, dict.fromkeys(rules.columns()), nulls=nulls):
        columns = {f"{owner}_id": ids.convert(f"{owner}_id", batch, rules.id)}
        first = first_occurrences(known, columns[f"{owner}_id"])
        batch.require(first, rules.id, f"unique: each {owner} has one line")
        columns |= {name: batch.codes(name, vocabularies[name]) for name in rules.side}
        columns |= {name: batch.small_numbers(name) for name in rules.dense}
        yield pa.table(columns)


def _visits(lines: Columns, rules: EventMapping) -> Columns:
    """Return visits of exposures with outcomes (``layout = "exposures"``)."""
    taken = ("visit_id", "user_id", "author_id", "item_id", "domain", "play_ms")
    context = rules.features.context
    visits = {name: lines[name] for name in (*taken, *context.side, *context.dense)}
    visits["request_ms"] = lines["time_ms"]
    longest = lines["play_ms"]
    for name, behaviour in rules.behaviours.items():
        when = np.zeros_like(longest) if behaviour.at == "start" else lines["play_ms"]
        delay = np.where(lines[f"happened_{name}"] > 0, lines.get(f"delay_{name}", when), -1)
        visits[f"delay_{name}"] = delay.astype(np.int32)
        longest = np.maximum(longest, delay)
    if "gift" in rules.behaviours:
        visits["value_gift"] = np.maximum(lines["happened_gift"], 0).astype(np.float32)
    visits["exit_ms"] = lines["time_ms"] + longest
    return visits


def _import_single_events(
    log: UserLog,
    rules: EventMapping,
    builder: DatasetBuilder,
    spec: DatasetSpec,
    folder: Path,
    report: Progress,
    checks: _IdChecks,
) -> dict[str, int]:
    """Assemble visits from single events, partition by partition; return the counts for ``DatasetSpec.extra``."""
    ids = ("user_id", "author_id", "item_id", "visit_id", "time_ms", "row")
    context = rules.features.context
    schema = pa.schema(
        [
            *((name, pa.int64()) for name in ids),
            ("domain", pa.int8()),
            ("code", pa.int8()),
            ("value", pa.float64()),
            *((name, pa.int32()) for name in context.side),
            *((name, pa.float32()) for name in context.dense),
        ]
    )
    spill = Spill(folder / "events", schema, spec.partitions)
    for lines in log.batches(lambda done, total: report("reading logs", done, total)):
        checks.add(lines)
        spill.add(lines)
    spill.flush()
    checks.finish(log)
    begin = EventCodes.EXPOSURE if rules.events.exposure else EventCodes.ENTER
    codes = EventCodes(spec.behaviours, begin)
    names = np.array([*VISIT_EVENTS, *spec.behaviours])
    own_ids = rules.columns.visit_id is not None
    orphans = duplicates = 0
    for partition in range(spec.partitions):
        report("sorting events", partition, spec.partitions)
        events = spill.pop(partition)
        compared = [name for name in events if name not in ({"row"} if own_ids else {"row", "visit_id"})]
        _, again = find_duplicates(events, ("user_id", "item_id", "time_ms", "code"), compared)
        duplicates += len(again)
        if rules.duplicates == "drop":
            events = {name: np.delete(column, again) for name, column in events.items()}
        assembled = assemble_visits(
            events,
            codes,
            by_visit_id=own_ids,
            has_value=rules.columns.value is not None,
        )
        if len(assembled.orphans) and rules.orphans == "error":
            first = int(assembled.orphans[np.argmin(events["row"][assembled.orphans])])
            accepted = f'after the {names[begin]} of its visit; or set orphans = "drop" in the mapping'
            log.raise_bad_value(
                int(events["row"][first]), str(rules.columns.event), str(names[events["code"][first]]), accepted
            )
        orphans += len(assembled.orphans)
        builder.visits(pa.table(assembled.visits))
        builder.events(_event_table(assembled.events, names))
    report("sorting events", spec.partitions, spec.partitions)
    dropped = duplicates if rules.duplicates == "drop" else 0
    return {"orphans_dropped": orphans, "duplicate_lines": duplicates, "duplicates_dropped": dropped}


def _event_table(events: Columns, names: np.ndarray) -> pa.Table:
    """Return events in the canonical schema."""
    event = pa.DictionaryArray.from_arrays(pa.array(events["code"]), pa.array(names))
    return pa.table(
        [event if name == "event" else pa.array(events[name]) for name in EVENT_COLUMNS.names], schema=EVENT_COLUMNS
    )
