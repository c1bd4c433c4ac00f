"""A log of the user's own, Parquet or CSV, to a canonical dataset.

A TOML file says what its columns mean. ``layout = "exposures"``: a line is an exposure with its outcomes.
``layout = "events"``: a line is one event (an exposure, an enter, a like, an exit ...), and visits are put together
from them (``assemble_visits.py``). All keys, with their defaults where they have one::

    layout = "exposures"             # or "events"
    name = "events"                  # of the dataset; also source = "" and licence = ""
    timezone = "UTC"                 # in which days are counted; also of times without an offset
    files = "*"                      # which files of the folder SRC; every .csv, .csv.gz and .parquet by default
    time_unit = "ms"                 # of times that are numbers: "s", "ms", "us", "ns"; text is ISO 8601
    out_of_order = "error"           # a time earlier than the line before in the file; or "sort"
    orphans = "error"                # "events": an event without an exposure before it; or "drop", and count
    hash_ids = []                    # of user_id, author_id, item_id, visit_id: those that are text, see below
    candidates = ["video", "live"]   # domains whose exposures become training rows
    statistics = [["user"], ["item"], ["author"], ["user", "author"]]
    tag = ""                         # side feature of items that histories keep with every visit; empty: none

    [columns]                        # canonical name = your column
    user_id = "uid"                  # required, as are author_id, item_id and time
    author_id = "anchor"
    item_id = "room"
    time = "ts"
    visit_id = "session"             # optional; unique in the log
    play_ms = "watched"              # "exposures", optional: milliseconds watched
    event = "action"                 # "events": required
    value = "amount"                 # "events", optional: milliseconds watched of an exit, price of a gift

    [domain]                         # one of the two
    constant = "live"
    column = "type"                  # with video = ["1"] and live = ["2", "3"], its values as text

    [behaviours]                     # in label order; the name gift has a price
    like = {column = "is_like"}      # "exposures": happened where the number is above 0, or true
    click = {column = "clk", at = "start"}         # when it happened: at = "start", or "end" of the watch (default)
    gift = {column = "price", delay = "gift_ms", applies = ["live"]}   # or delay: a column of ms since the exposure
    share = {events = ["share", "repost"]}         # "events": your names of it

    [events]                         # "events": your names of what is no behaviour
    exposure = ["show"]              # a visit begins with its exposure; without any mapped, with enter
    enter = ["enter"]
    exit = ["leave"]
    ignore = ["heartbeat"]           # any other name is an error

    [features]                       # columns that become features: categories (side) and numbers (dense)
    context = {side = ["tab"], dense = ["battery"]}                    # of the log
    user = {file = "users.csv", id = "uid", side = ["city"], dense = ["age"]}
                                     # also author and item; the path is relative to the mapping's folder

Ids are whole numbers, 0 or more. Ids that are text must be named in ``hash_ids``: they become 63 bits of a BLAKE2b
hash, and the number of texts that met in one id is written to ``extra.hash_collisions`` of ``dataset.json`` (expected
is n^2 / 2^64 for n ids). Codes of side features are 1 + the position in ``extra.vocabularies``; 0 is missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from trainer.data.format.schema import EVENT_COLUMNS, VISIT_EVENTS, DatasetSpec, DenseFeature, SideFeature, SideOwner
from trainer.data.format.validation import Columns
from trainer.data.importers import field_parsers
from trainer.data.importers.category_codes import encode
from trainer.data.importers.mapping import EventMapping, TableFeatures, load_mapping
from trainer.data.importers.scratch_dir import scratch_folder
from trainer.data.importers.table_files import convert, read_batches
from trainer.data.importers.user_log import Ids, Log, source_files, vocabularies_of
from trainer.data.importers.visit_assembly import EventCodes, assemble_visits
from trainer.data.writing.builder import DatasetBuilder, Progress
from trainer.data.writing.partition_spill import Spill

Vocabularies = dict[str, tuple[str, ...]]


def import_events(
    src: str | Path, out: str | Path, mapping: str | Path, partitions: int = 8, progress: Progress | None = None
) -> DatasetSpec:
    """Build a dataset from a log.

    The log passes through in blocks. In memory are the categories, 32 to 56 bytes for each hashed id, with
    ``layout = "events"`` the events of one partition, and what the builder needs.

    Args:
        src: a ``.parquet``, ``.csv`` or ``.csv.gz`` file, or a folder of them, read in order of their names.
        out: the dataset to make; must not exist.
        mapping: the TOML file described above.
        partitions: number of partitions.
        progress: told about the work as it goes.

    Returns:
        The description of the dataset.

    Raises:
        UserError: a mistake in the mapping (names file and key) or in the log (names file, row, column and value).
    """
    rules = load_mapping(mapping)
    report = progress or (lambda what, done, total: None)
    tables = {owner: Path(mapping).parent / table.file for owner, table in rules.features.tables().items()}
    files = source_files(Path(src), rules.files, {file.resolve() for file in tables.values()})
    context = vocabularies_of(files, rules.features.context.side)
    by_owner = {
        owner: vocabularies_of((tables[owner],), table.side) for owner, table in rules.features.tables().items()
    }
    ids = Ids(rules)
    log = Log(files, rules, ids, context)
    spec = _spec(rules, files, partitions, context, by_owner)
    with DatasetBuilder(out, spec) as builder, scratch_folder(out) as folder:
        for owner, table in rules.features.tables().items():
            for part in _feature_table(tables[owner], owner, table, by_owner[owner], ids):
                builder.table(f"{owner}s", part)
        orphans = 0
        if rules.layout == "events":
            orphans = _import_single_events(log, rules, builder, spec, folder, report)
        else:
            for lines in log.parts(lambda done, total: report("reading logs", done, total)):
                builder.visits(pa.table(_visits(lines, rules)))
        found = {"log_rows": log.rows, "orphans_dropped": orphans, "hash_collisions": ids.collisions}
        return builder.finish(progress, found)


def _spec(
    rules: EventMapping,
    files: tuple[Path, ...],
    partitions: int,
    context: Vocabularies,
    by_owner: dict[str, Vocabularies],
) -> DatasetSpec:
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
    file: Path, owner: str, rules: TableFeatures, vocabularies: Vocabularies, ids: Ids
) -> Iterator[pa.Table]:
    """The table of users, authors or items, part by part."""
    row = 1
    for batch in read_batches(file, dict.fromkeys((rules.id, *rules.side, *rules.dense))):
        columns = {f"{owner}_id": ids.of(f"{owner}_id", batch.column(rules.id), file, rules.id, row)}
        columns |= {name: encode(batch.column(name), vocabularies[name]) for name in rules.side}
        for name in rules.dense:
            values = convert(
                batch.column(name), field_parsers.numbers, file, name, row, "a finite number, true or false"
            )
            columns[name] = values.to_numpy(zero_copy_only=False).astype(np.float32)
        yield pa.table(columns)
        row += batch.num_rows


def _visits(lines: Columns, rules: EventMapping) -> Columns:
    """Visits of exposures with outcomes."""
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
    log: Log, rules: EventMapping, builder: DatasetBuilder, spec: DatasetSpec, folder: Path, report: Progress
) -> int:
    """Put visits together partition by partition; the number of orphans."""
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
    for lines in log.parts(lambda done, total: report("reading logs", done, total)):
        spill.add(lines)
    spill.flush()
    begin = EventCodes.EXPOSURE if rules.events.exposure else EventCodes.ENTER
    codes = EventCodes(spec.behaviours, begin)
    names = np.array([*VISIT_EVENTS, *spec.behaviours])
    orphans = 0
    for partition in range(spec.partitions):
        report("sorting events", partition, spec.partitions)
        events = spill.pop(partition)
        made = assemble_visits(
            events,
            codes,
            by_visit_id=rules.columns.visit_id is not None,
            has_value=rules.columns.value is not None,
        )
        if len(made.orphans) and rules.orphans == "error":
            first = int(made.orphans[np.argmin(events["row"][made.orphans])])
            accepted = f'after the {names[begin]} of its visit; or set orphans = "drop" in the mapping'
            log.refuse(int(events["row"][first]), str(rules.columns.event), str(names[events["code"][first]]), accepted)
        orphans += len(made.orphans)
        builder.visits(pa.table(made.visits))
        builder.events(_event_table(made.events, names))
    report("sorting events", spec.partitions, spec.partitions)
    return orphans


def _event_table(events: Columns, names: np.ndarray) -> pa.Table:
    """Events in the canonical schema."""
    event = pa.DictionaryArray.from_arrays(pa.array(events["code"]), pa.array(names))
    return pa.table(
        [event if name == "event" else pa.array(events[name]) for name in EVENT_COLUMNS.names], schema=EVENT_COLUMNS
    )
