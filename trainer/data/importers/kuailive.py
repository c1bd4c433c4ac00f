"""Importer of KuaiLive as its authors publish it: live rooms, with exposures that were not clicked.

It reads ``user.csv``, ``streamer.csv``, ``room.csv``, ``click.csv``, ``negative.csv``, ``like.csv``, ``comment.csv``,
``gift.csv`` and the title vectors. The files leave some points open; they are treated like this:

* An exposure is a line of ``click.csv`` or ``negative.csv``. The request time of a click is the time of the click: the
  log has no other. Of several lines with the same (user, room, time) the first is kept, and clicks come before
  exposures without one.
* Likes, comments and gifts do not name a click. Each belongs to the user's latest earlier click of the room
  (``event_attribution.py``). Events without such a click are dropped and counted in ``extra.orphans_dropped``.
* Views are derived from ``watch_live_time`` by our own thresholds (``view_thresholds.py``).
* ``room.csv`` repeats rooms that last beyond midnight; the first line is kept.
* The content vector of a room (``embeddings/items``) is that of its title, which is known when the room opens.

A feature uses only what was known at the request. These columns are therefore left out or limited:

====================================  =================================================================================
column                                reason
====================================  =================================================================================
room ``end_timestamp``, ``p_date``    The future: a line for a day reveals that the room lasted until then. So there is
                                      no position relative to the length of the room, only ``log_room_age_s``.
click ``watch_live_time``             It is the outcome.
``accu_*``, ``fans_*``, ``follow_*``  Counts of an unknown day: if taken after the log, they contain its clicks and
                                      gifts. The dataset's statistics count earlier rows instead.
dates of registration, first show     A date in the future would reveal what will happen. It counts as unknown until its
and first watch                       day is over, and then as the number of days since.
====================================  =================================================================================

Profiles (age, device, country, operational category, ``onehot_feat*``) have no date, either; they change slowly and are
taken as constant. The type and the category of a room are taken as known when it opens.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from trainer.console.errors import UserError
from trainer.data.format.content_vectors import ITEM_VECTORS
from trainer.data.format.id_index import IdIndex
from trainer.data.format.schema import DOMAINS, DatasetSpec, DenseFeature, SideFeature, SideOwner
from trainer.data.format.validation import Columns
from trainer.data.importers import shanghai_time, view_thresholds
from trainer.data.importers.category_codes import vocabulary
from trainer.data.importers.columns import SourceReader, read_column_batches
from trainer.data.importers.event_attribution import EventJoin, add_joined, no_behaviours
from trainer.data.importers.id_lookup import IdLookup, first_occurrences
from trainer.data.importers.published_vectors import find_title_file, write_title_vectors
from trainer.data.importers.scratch_dir import scratch_folder
from trainer.data.importers.table_files import column_names
from trainer.data.writing.builder import DatasetBuilder, Progress
from trainer.data.writing.duplicates import DuplicateRule

SOURCE = "KuaiLive, 5 to 25 May 2025: https://imgkkk574.github.io/KuaiLive, https://zenodo.org/records/16565801"
LICENCE = "CC BY-NC-SA 4.0 (not for commercial use)"

BEHAVIOURS = ("click", "effective_view", "long_view", "like", "comment", "gift")
STATISTICS = (
    ("user",),
    ("author",),
    ("item",),
    ("user", "author"),
    ("user", "content_category"),
    ("author", "hour"),
    ("content_category", "hour"),
)

_FILES = ("user", "streamer", "room", "click", "negative", "like", "comment", "gift")
_ONEHOT = tuple(f"onehot_feat{number}" for number in range(7))
_PROFILE = ("age", "gender", "country", "device_brand", "device_price", *_ONEHOT)
_USER_CATEGORIES = (*_PROFILE, "is_live_streamer", "is_photo_author")
_STREAMER_CATEGORIES = (*_PROFILE, "live_operation_tag")
_ROOM_CATEGORIES = {"live_type": "live_type", "live_content_category": "content_category"}
"""Features by column of ``room.csv``."""
_OTHER_NAMES = {
    "streamer_id": "author_id",
    "is_live_streamer": "is_live_author",
    "is_photo_author": "is_video_author",
}
"""Names of columns in other versions of the files."""
_AGES = {
    "user_days": ("user", "reg_timestamp"),
    "user_live_days": ("user", "first_watch_live_timestamp"),
    "author_days": ("streamer", "reg_timestamp"),
    "author_live_days": ("streamer", "first_live_timestamp"),
}
"""File and column of the date, by the name of the feature that counts the days since."""
_LIVE = DOMAINS.index("live")
_UNKNOWN_DAY = -1


def import_kuailive(
    src: str | Path, out: str | Path, partitions: int = 16, progress: Progress | None = None
) -> DatasetSpec:
    """Build a dataset from a folder of KuaiLive.

    The logs are read in blocks and spilled to disk. Memory holds the clicks and events of one partition, 32 bytes per
    room (370 MB for all of KuaiLive), the vectors of the titles, and what the builder needs.

    Args:
        src: the unpacked folder.
        out: the dataset to make; must not exist.
        partitions: number of partitions; the largest one must fit in memory.
        progress: callback that gets the name of a phase, the work done and the total work.

    Returns:
        The description of the dataset.

    Raises:
        UserError: a file or column is missing, or a value is bad; names file, row and column.
    """
    source = _KuaiLiveFiles(Path(src), progress)
    vocabularies = source.vocabularies()
    spec = _spec(source, vocabularies, partitions)
    with DatasetBuilder(out, spec, duplicates=DuplicateRule()) as builder:
        for table in source.profiles("user", "user_id", "user", _USER_CATEGORIES, vocabularies):
            builder.table("users", table)
        for table in source.profiles("streamer", "streamer_id", "author", _STREAMER_CATEGORIES, vocabularies):
            builder.table("authors", table)
        for table in source.rooms(vocabularies):
            builder.table("items", table)
        with scratch_folder(out) as folder:
            join = EventJoin(folder / "join", spec)
            for columns in source.exposures("click"):
                join.visits(columns)
            for behaviour in ("like", "comment", "gift"):
                for columns in source.events(behaviour):
                    join.events(behaviour, columns)
            orphans = add_joined(join, builder, partitions, progress)
        # after the clicks, because the builder keeps the first of several visits with the same key
        for columns in source.exposures("negative"):
            builder.visits(pa.table(columns))
        without = write_title_vectors(builder.folder(ITEM_VECTORS), source.titles, *source.title_of_shown())
        facts = {"log_rows": source.exposed, "orphans_dropped": orphans, "items_without_embedding": without}
        return builder.finish(progress, facts)


class _KuaiLiveFiles:
    """Reader of the files of KuaiLive; it keeps what later files need from earlier ones.

    Args:
        folder: the unpacked folder.
        progress: callback of ``SourceReader``.

    Raises:
        UserError: the folder or a file is missing.
    """

    def __init__(self, folder: Path, progress: Progress | None) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; unpack KuaiLive.zip and give its folder")
        self.files = {name: folder / f"{name}.csv" for name in _FILES}
        for file in self.files.values():
            if not file.is_file():
                raise UserError(f"{file}: is missing; it is one of the files of KuaiLive")
        self.titles = find_title_file(folder)
        self._reader = SourceReader(self.files.values(), progress)
        self.exposed = 0
        self._days = {name: IdLookup(_UNKNOWN_DAY) for name in _AGES}
        self._room_start = IdLookup(missing=-1)
        self._room_title = IdLookup(missing=-1)
        self._shown = IdIndex()

    def vocabularies(self) -> dict[str, tuple[str, ...]]:
        """Return the values of the categories, by feature."""
        values: dict[str, set[str]] = {}
        for name, features in _category_columns():
            columns = [self._column_name(name, column) for column in features]
            for batch in read_column_batches(self.files[name], dict.fromkeys(columns)):
                for column, feature in zip(columns, features.values(), strict=True):
                    values.setdefault(feature, set()).update(batch.categories(column))
        return {feature: vocabulary(found) for feature, found in values.items()}

    def profiles(
        self, name: str, key: str, owner: str, categories: tuple[str, ...], vocabularies: dict[str, tuple[str, ...]]
    ) -> Iterator[pa.Table]:
        """Yield the table of users or authors, batch by batch, and keep their dates."""
        file_columns = {column: self._column_name(name, column) for column in (key, *categories)}
        dates = {age: column for age, (file, column) in _AGES.items() if file == name}
        types = {
            column: pa.int64() if column == file_columns[key] else None
            for column in (*file_columns.values(), *dates.values())
        }
        known = IdIndex()
        for batch in self._reader.batches(self.files[name], types):
            ids = batch.ids(file_columns[key])
            batch.require(first_occurrences(known, ids), file_columns[key], "an id that occurs only once")
            for age, column in dates.items():
                self._days[age].add(ids, batch.days(column))
            features = {_feature(owner, column): file_columns[column] for column in categories}
            codes = {feature: batch.codes(column, vocabularies[feature]) for feature, column in features.items()}
            yield pa.table({f"{owner}_id": ids, **codes})

    def rooms(self, vocabularies: dict[str, tuple[str, ...]]) -> Iterator[pa.Table]:
        """Yield the table of items, batch by batch, each room once."""
        author = self._column_name("room", "streamer_id")
        numbers = ("live_id", author, "start_timestamp", "live_name_id")
        known = IdIndex()
        types = {**dict.fromkeys(numbers, pa.int64()), **dict.fromkeys(_ROOM_CATEGORIES)}
        for batch in self._reader.batches(self.files["room"], types):
            ids, start_ms = batch.ids("live_id"), batch.times("start_timestamp", shanghai_time.TIMEZONE)
            first = first_occurrences(known, ids)
            title = batch.convert("live_name_id", lambda values: values.fill_null(-1), "a whole number")
            self._room_start.add(ids[first], start_ms[first])
            self._room_title.add(ids[first], title[first])
            columns = {"item_id": ids, "author_id": batch.ids(author), "start_ms": start_ms}
            columns["domain"] = np.full(batch.rows, _LIVE, np.int8)
            for column, feature in _ROOM_CATEGORIES.items():
                columns[feature] = batch.codes(column, vocabularies[feature])
            yield pa.table({name: values[first] for name, values in columns.items()})

    def exposures(self, name: str) -> Iterator[Columns]:
        """Yield the visits of ``click`` or ``negative`` before events are attributed, batch by batch."""
        author = self._column_name(name, "streamer_id")
        types = dict.fromkeys(("user_id", "live_id", author, "timestamp"), pa.int64())
        clicked = name == "click"
        if clicked:
            types["watch_live_time"] = pa.float64()
        for batch in self._reader.batches(self.files[name], types):
            request_ms = batch.times("timestamp", shanghai_time.TIMEZONE)
            play_ms = batch.milliseconds("watch_live_time") if clicked else np.zeros(batch.rows, np.int64)
            user_id, author_id, item_id = batch.ids("user_id"), batch.ids(author), batch.ids("live_id")
            self._shown.add(item_id)
            columns = {
                "visit_id": np.arange(self.exposed, self.exposed + batch.rows),
                "user_id": user_id,
                "author_id": author_id,
                "item_id": item_id,
                "domain": np.full(batch.rows, _LIVE, np.int8),
                "request_ms": request_ms,
                "exit_ms": request_ms + play_ms,
                "play_ms": play_ms,
                **no_behaviours(BEHAVIOURS, batch.rows),
                "hour": shanghai_time.hour_code(request_ms),
                "weekday": shanghai_time.weekday_code(request_ms),
                "log_room_age_s": shanghai_time.log_seconds_since(self._room_start.lookup(item_id), request_ms),
                **self._ages(user_id, author_id, request_ms),
            }
            if clicked:
                columns["delay_click"] = np.zeros(batch.rows, np.int32)
                columns |= view_thresholds.live_view_delays(play_ms)
            self.exposed += batch.rows
            yield columns

    def events(self, behaviour: str) -> Iterator[Columns]:
        """Yield likes, comments or gifts, batch by batch."""
        types = dict.fromkeys(("user_id", "live_id", "timestamp"), pa.int64())
        if behaviour == "gift":
            types["gift_price"] = pa.float64()
        for batch in self._reader.batches(self.files[behaviour], types):
            columns = {"user_id": batch.ids("user_id"), "item_id": batch.ids("live_id")}
            columns["time_ms"] = batch.times("timestamp", shanghai_time.TIMEZONE)
            if behaviour == "gift":
                columns["value"] = batch.small_numbers("gift_price")
            yield columns

    def title_of_shown(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the sorted ids of rooms with an exposure, and the number of the title of each, -1 for none."""
        ids = np.sort(self._shown.ids)
        return ids, self._room_title.lookup(ids)

    def _column_name(self, name: str, column: str) -> str:
        """Return the name of a column in a file.

        If the file has neither name, the published one is returned, and reading the column raises the error.
        """
        other = _OTHER_NAMES.get(column, column)
        names = column_names(self.files[name])
        return other if other in names and column not in names else column

    def _ages(self, user_id: np.ndarray, author_id: np.ndarray, request_ms: np.ndarray) -> Columns:
        """Return the dense features ``log(1 + days)`` since the dates of ``_AGES``; 0 for unknown and future dates."""
        today = shanghai_time.local_day(request_ms)
        ages = {}
        for age, (name, _) in _AGES.items():
            day = self._days[age].lookup(user_id if name == "user" else author_id)
            # a date counts from the next day on: its time within the day is not known
            past = (day != _UNKNOWN_DAY) & (day < today)
            ages[f"log_{age}"] = np.log1p(np.where(past, today - day, 0)).astype(np.float32)
        return ages


def _spec(source: _KuaiLiveFiles, vocabularies: dict[str, tuple[str, ...]], partitions: int) -> DatasetSpec:
    """Return the content of ``dataset.json`` before the logs are read."""

    def side(owner: SideOwner, name: str) -> tuple[SideFeature, ...]:
        features = next(features for file, features in _category_columns() if file == name)
        return tuple(SideFeature(feature, owner, len(vocabularies[feature]) + 1) for feature in features.values())

    return DatasetSpec(
        name="KuaiLive",
        source=SOURCE,
        licence=LICENCE,
        partitions=partitions,
        timezone=shanghai_time.TIMEZONE,
        behaviours=BEHAVIOURS,
        applies={behaviour: ("live",) for behaviour in BEHAVIOURS},
        candidates=("live",),
        side=(
            *side("user", "user"),
            *side("author", "streamer"),
            *side("item", "room"),
            SideFeature("hour", "context", 25),
            SideFeature("weekday", "context", 8),
        ),
        dense=tuple(DenseFeature(name, "context") for name in ("log_room_age_s", *(f"log_{age}" for age in _AGES))),
        statistics=STATISTICS,
        tag="content_category",
        extra={
            "files": [*(file.name for file in source.files.values()), source.titles.name],
            "vocabularies": {feature: list(values) for feature, values in vocabularies.items()},
            "codes": "0 is unknown; 1 + position in `vocabularies`; hour + 1; weekday 1 (Monday) to 7",
            "views": view_thresholds.FACTS,
        },
    )


def _category_columns() -> list[tuple[str, dict[str, str]]]:
    """Return pairs of a file and the features of its category columns, by column."""
    return [
        ("user", {column: _feature("user", column) for column in _USER_CATEGORIES}),
        ("streamer", {column: _feature("author", column) for column in _STREAMER_CATEGORIES}),
        ("room", _ROOM_CATEGORIES),
    ]


def _feature(owner: str, column: str) -> str:
    """Return the feature of a column; users and authors share profile columns, so these get a prefix."""
    return f"{owner}_{column}" if column in _PROFILE else column
