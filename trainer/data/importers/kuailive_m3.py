"""Importer of KuaiLive-M3 as its authors publish it: live rooms and short videos.

Candidates are live rooms, entered (``live_interaction.csv``) or only shown (``live_show.parquet``). Visits to short
videos (``photo_play.parquet``) are part of the histories. Rooms and videos may have the same ids, so an item's id is
twice the published id, plus one for a room. Other choices:

* Likes, comments and shares have times of their own. Each belongs to the user's latest earlier visit to the room
  (``event_attribution.py``); those without such a visit are dropped and counted in ``extra.orphans_dropped``.
  Behaviours that a visit's line counts without such an event, gifts and follows among them, get the time of the
  visit's end.
* ``click`` means that the user entered the room other than by autoplay. The value of a gift is the number of gifts,
  because prices are not published. Views are derived from the time watched by the thresholds in
  ``view_thresholds.py``.
* The codes of ``like_status_type`` are not published, so videos have views and follows only.
* Comment texts, titles and subtitles become the dataset's texts (``text_schema.py``). Video vectors become
  ``embeddings/items``. Segment vectors become ``embeddings/segments``, by the row number in ``segments.parquet``.

A feature uses only what was known at the request. These columns are therefore left out:

==================================  ===================================================================================
column                              reason
==================================  ===================================================================================
``live_emb_64``                     It is made from the whole broadcast, including the future, so rooms have no item
                                    vector. A segment vector is known from ``known_ms`` on, the end of the segment.
room ``end_timestamp``,             They are the future. There is no position relative to the length of the room, only
``live_duration``                   ``log_room_age_s``.
``live_source_category``,           Only lines of entered rooms have them, so they would reveal that the room was
``enter_live_action``,              entered.
``is_follow_enter``
``play_duration``, all counts,      They are the outcome.
``is_follow_leave``
``fans_user_num``,                  They are of an unknown day or of the whole period: an author who will go live later
``is_live_author``,                 has the flag already.
``is_photo_author``
``photo_interaction.csv``,          They have no times.
``live_questionnaire.csv``
==================================  ===================================================================================

The published selection of segments depends on the future, too: only segments with a viewer are published.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trainer.console.errors import UserError
from trainer.data.format.content_vectors import ITEM_VECTORS, SEGMENT_VECTORS
from trainer.data.format.id_index import IdIndex
from trainer.data.format.schema import DOMAINS, DatasetSpec, DenseFeature, SideFeature
from trainer.data.format.validation import Columns
from trainer.data.importers import shanghai_time, view_thresholds
from trainer.data.importers.category_codes import vocabulary
from trainer.data.importers.columns import ColumnBatch, SourceReader, read_column_batches
from trainer.data.importers.event_attribution import EventJoin, add_joined, no_behaviours
from trainer.data.importers.field_parsers import text_hashes
from trainer.data.importers.id_consistency import line_hash
from trainer.data.importers.id_lookup import IdLookup, first_occurrences
from trainer.data.importers.null_markers import VALUE_NULLS, NullMarkers
from trainer.data.importers.published_vectors import VECTORS, read_vectors, write_vectors
from trainer.data.importers.scratch_dir import scratch_folder
from trainer.data.writing.builder import DatasetBuilder, Progress
from trainer.data.writing.duplicates import DuplicateRule

SOURCE = "KuaiLive-M3: https://github.com/imgkkk574/KuaiLive-M3, https://huggingface.co/datasets/imgkkk2004/KuaiLive-M3"
LICENCE = "not stated with the data's description: see the dataset's page before you use or share it"

BEHAVIOURS = ("click", "effective_view", "long_view", "like", "comment", "gift", "follow", "share")
_OF_VIDEOS = ("effective_view", "long_view", "follow")
STATISTICS = (("user",), ("author",), ("item",), ("user", "author"), ("author", "hour"))
VECTOR_DIM = 128

_VIDEO, _LIVE = DOMAINS.index("video"), DOMAINS.index("live")
_LARGEST_ID = (1 << 62) - 1
_FILES = {
    "authors": "author_profile.csv",
    "sessions": "live_interaction.csv",
    "shows": "live_show.parquet",
    "comment": "live_comment.csv",
    "like": "live_like.csv",
    "share": "live_share.csv",
    "rooms": "live_room_meta.parquet",
    "plays": "photo_play.parquet",
    "videos": "photo_meta.parquet",
    "tags": "photo_tag.csv",
    "video vectors": "photo_emb_128.parquet",
}
_SEGMENTS = "live_emb_128_ts"
_COUNTED = {
    "like": "like_cnt",
    "comment": "comment_cnt",
    "gift": "send_gift_cnt",
    "follow": "follow_author_cnt",
    "share": "share_cnt",
}
"""Columns of ``live_interaction.csv`` with the count of a behaviour in a visit, by behaviour."""
_EVENT_COLUMNS = {
    "like": ("live_id", "like_timestamp"),
    "comment": ("live_stream_id", "comment_ts"),
    "share": ("live_id", "share_timestamp"),
}
"""Columns of room and time in the behaviour's own file, by behaviour."""
_AUTHOR_CATEGORIES = {"gender": "author_gender", "age_segment": "author_age"}
_CATEGORIES = {"first_level_category_name": "category_1", "second_level_category_name": "category_2"}
_NULLS = NullMarkers((*VALUE_NULLS, "U", "unknown"))
_UNIQUE_ID = "an id that occurs only once"
_NO_IDS = np.empty(0, np.int64)


def import_kuailive_m3(
    src: str | Path, out: str | Path, partitions: int = 16, progress: Progress | None = None
) -> DatasetSpec:
    """Build a dataset from a folder of KuaiLive-M3.

    All files are read in blocks, and the logs of live rooms are spilled to disk. Memory holds the room visits and
    events of one partition, 16 bytes per room and 48 per video (430 MB for all of KuaiLive-M3), and what the builder
    needs. For the hash of the segments it holds 64 bytes per segment for a moment.

    Args:
        src: the downloaded folder.
        out: the dataset to make; must not exist.
        partitions: number of partitions; the largest one must fit in memory.
        progress: callback that gets the name of a phase, the work done and the total work.

    Returns:
        The description of the dataset.

    Raises:
        UserError: a file or column is missing, or a value is bad; names file, row and column.
    """
    source = _KuaiLiveM3Files(Path(src), progress)
    vocabularies = source.vocabularies()
    spec = _spec(source, vocabularies, partitions)
    with DatasetBuilder(out, spec, duplicates=DuplicateRule()) as builder:
        for table in source.authors(vocabularies):
            builder.table("authors", table)
        for table, texts in itertools.chain(source.rooms(), source.videos(vocabularies)):
            builder.table("items", table)
            builder.texts("items", texts)
        with scratch_folder(out) as folder:
            join = EventJoin(folder / "join", spec)
            for columns in source.sessions():
                join.visits(columns)
            for behaviour in _EVENT_COLUMNS:
                for columns in source.events(behaviour):
                    join.events(behaviour, columns)
            orphans = add_joined(join, builder, partitions, progress)
        for columns in source.shows():
            builder.visits(pa.table(columns))
        for columns in source.plays():
            builder.visits(pa.table(columns))
        for table in source.comments():
            builder.texts("comments", table)
        for table in source.segments():
            builder.table("segments", table)
        source.write_vectors(builder)
        return builder.finish(progress, {"log_rows": source.exposed, "orphans_dropped": orphans})


class _KuaiLiveM3Files:
    """Reader of the files of KuaiLive-M3; it keeps what later files need from earlier ones.

    Args:
        folder: the downloaded folder.
        progress: callback of ``SourceReader``.

    Raises:
        UserError: the folder or a file is missing.
    """

    def __init__(self, folder: Path, progress: Progress | None) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; download KuaiLive-M3 and give its folder")
        self.files = {key: folder / name for key, name in _FILES.items()}
        for file in self.files.values():
            if not file.is_file():
                raise UserError(f"{file}: is missing; it is one of the files of KuaiLive-M3")
        self.segment_files = tuple(sorted((folder / _SEGMENTS).glob("*.parquet")))
        if not self.segment_files:
            raise UserError(f"{folder / _SEGMENTS}: no *.parquet here; KuaiLive-M3 keeps its segment vectors there")
        self.exposed = 0
        self._reader = SourceReader((*self.files.values(), *self.segment_files), progress, _NULLS)
        self._room_start = IdLookup(missing=-1)
        self._duration = IdLookup(missing=0)

    def vocabularies(self) -> dict[str, tuple[str, ...]]:
        """Return the values of the categories, by feature."""
        values: dict[str, set[str]] = {}
        for file, features in (("authors", _AUTHOR_CATEGORIES), ("tags", _CATEGORIES)):
            for batch in read_column_batches(self.files[file], dict.fromkeys(features), nulls=_NULLS):
                for column, feature in features.items():
                    values.setdefault(feature, set()).update(batch.categories(column))
        return {feature: vocabulary(found) for feature, found in values.items()}

    def authors(self, vocabularies: dict[str, tuple[str, ...]]) -> Iterator[pa.Table]:
        """Yield the table of authors, batch by batch."""
        known = IdIndex()
        types = {"author_id": pa.int64(), **dict.fromkeys(_AUTHOR_CATEGORIES)}
        for batch in self._reader.batches(self.files["authors"], types):
            ids = batch.ids("author_id")
            batch.require(first_occurrences(known, ids), "author_id", _UNIQUE_ID)
            codes = {name: batch.codes(own, vocabularies[name]) for own, name in _AUTHOR_CATEGORIES.items()}
            yield pa.table({"author_id": ids, **codes})

    def rooms(self) -> Iterator[tuple[pa.Table, pa.Table]]:
        """Yield the rooms for the tables of items and of their texts, batch by batch.

        A long room has a line for each day; only the first is kept.
        """
        known = IdIndex()
        types = dict.fromkeys(("live_id", "author_id", "start_timestamp", "live_name"))
        for batch in self._reader.batches(self.files["rooms"], types):
            item_id, start_ms = _items(batch, "live_id", _LIVE), batch.times("start_timestamp", shanghai_time.TIMEZONE)
            first = first_occurrences(known, item_id)
            self._room_start.add(item_id[first], start_ms[first])
            nothing = np.zeros(batch.rows, np.int64)
            columns = _item_columns(item_id, batch.ids("author_id"), _LIVE, start_ms, nothing, nothing, nothing)
            texts = {"tag": pa.array([""] * batch.rows), "text": batch.text("live_name")}
            yield tuple(table.filter(first) for table in _item_tables(columns, texts))

    def videos(self, vocabularies: dict[str, tuple[str, ...]]) -> Iterator[tuple[pa.Table, pa.Table]]:
        """Yield the videos for the tables of items and of their texts, batch by batch."""
        codes = {feature: IdLookup(missing=0) for feature in _CATEGORIES.values()}
        known = IdIndex()
        for batch in self._reader.batches(self.files["tags"], {"photo_id": pa.int64(), **dict.fromkeys(_CATEGORIES)}):
            item_id = _items(batch, "photo_id", _VIDEO)
            batch.require(first_occurrences(known, item_id), "photo_id", _UNIQUE_ID)
            for column, feature in _CATEGORIES.items():
                codes[feature].add(item_id, batch.codes(column, vocabularies[feature]).astype(np.int64))
        known = IdIndex()
        names = pa.array(["", *vocabularies["category_2"]])
        types = dict.fromkeys(("photo_id", "author_id", "duration", "cover_title", "video_texts"))
        for batch in self._reader.batches(self.files["videos"], types):
            item_id, duration_ms = _items(batch, "photo_id", _VIDEO), batch.milliseconds("duration")
            batch.require(first_occurrences(known, item_id), "photo_id", _UNIQUE_ID)
            self._duration.add(item_id, duration_ms)
            category = [codes[feature].lookup(item_id) for feature in _CATEGORIES.values()]
            nothing = np.zeros(batch.rows, np.int64)
            columns = _item_columns(item_id, batch.ids("author_id"), _VIDEO, nothing, duration_ms, *category)
            title, inside = (batch.text(name) for name in ("cover_title", "video_texts"))
            text = pc.utf8_trim_whitespace(pc.binary_join_element_wise(title, inside, "\n"))
            yield _item_tables(columns, {"tag": names.take(pa.array(category[1])), "text": text})

    def sessions(self) -> Iterator[Columns]:
        """Yield the visits to rooms before events are attributed, batch by batch."""
        start, end = "live_play_start_timestamp", "live_play_end_timestamp"
        columns = ("user_id", "author_id", "live_id", start, end, "is_auto_play", "play_duration", "send_gift_num")
        for batch in self._reader.batches(self.files["sessions"], dict.fromkeys((*columns, *_COUNTED.values()))):
            request_ms, end_ms = batch.times(start, shanghai_time.TIMEZONE), batch.times(end, shanghai_time.TIMEZONE)
            batch.require(end_ms >= request_ms, end, f"no earlier than {start}")
            play_ms = batch.milliseconds("play_duration")
            exit_ms = np.maximum(end_ms, request_ms + play_ms)
            length = exit_ms - request_ms
            batch.require(length < 1 << 31, end, f"less than 2^31 ms after {start}")
            visits = self._visits(batch, "live_id", _LIVE, request_ms) | {"exit_ms": exit_ms, "play_ms": play_ms}
            visits |= view_thresholds.live_view_delays(play_ms)
            visits["delay_click"] = np.where(batch.numbers("is_auto_play") > 0, -1, 0).astype(np.int32)
            for behaviour, count in _COUNTED.items():
                visits[f"delay_{behaviour}"] = np.where(batch.numbers(count) > 0, length, -1).astype(np.int32)
            visits["value_gift"] = batch.small_numbers("send_gift_num")
            yield visits

    def shows(self) -> Iterator[Columns]:
        """Yield the visits of rooms that were shown but not entered, batch by batch."""
        types = dict.fromkeys(("user_id", "author_id", "live_id", "show_timestamp"))
        for batch in self._reader.batches(self.files["shows"], types):
            request_ms = batch.times("show_timestamp", shanghai_time.TIMEZONE)
            yield self._visits(batch, "live_id", _LIVE, request_ms)

    def plays(self) -> Iterator[Columns]:
        """Yield the visits to videos, batch by batch."""
        start, end = "enter_timestamp", "leave_timestamp"
        flags = ("is_complete_play", "is_follow_before_play", "is_follow_after_play")
        types = dict.fromkeys(("user_id", "author_id", "photo_id", start, end, *flags))
        for batch in self._reader.batches(self.files["plays"], types):
            request_ms, exit_ms = batch.times(start, shanghai_time.TIMEZONE), batch.times(end, shanghai_time.TIMEZONE)
            batch.require(exit_ms >= request_ms, end, f"no earlier than {start}")
            play_ms = exit_ms - request_ms
            batch.require(play_ms < 1 << 31, end, f"less than 2^31 ms after {start}")
            visits = self._visits(batch, "photo_id", _VIDEO, request_ms) | {"exit_ms": exit_ms, "play_ms": play_ms}
            complete, before, after = (batch.numbers(flag) > 0 for flag in flags)
            visits |= view_thresholds.video_view_delays(play_ms, self._duration.lookup(visits["item_id"]), complete)
            visits["delay_follow"] = np.where(after & ~before, play_ms, -1).astype(np.int32)
            yield visits

    def events(self, behaviour: str) -> Iterator[Columns]:
        """Yield likes, comments or shares, batch by batch."""
        room, time = _EVENT_COLUMNS[behaviour]
        more = {"share": ("is_share_success",), "comment": ("content",)}.get(behaviour, ())
        types = dict.fromkeys(("user_id", room, time, *more))
        for batch in self._reader.batches(self.files[behaviour], types, multiline=behaviour == "comment"):
            columns = {"user_id": batch.ids("user_id"), "item_id": _items(batch, room, _LIVE)}
            columns["time_ms"] = batch.times(time, shanghai_time.TIMEZONE)
            if behaviour == "comment":
                columns["line"] = _text_hash(batch)
            if behaviour == "share":
                happened = batch.numbers("is_share_success") > 0
                columns = {name: column[happened] for name, column in columns.items()}
            yield columns

    def comments(self) -> Iterator[pa.Table]:
        """Yield the table of comment texts, batch by batch; a comment's id is the number of its line, from 0.

        Lines that repeat an earlier one are left out. They are told by a hash of 64 bits.
        """
        known = IdIndex()
        room, time = _EVENT_COLUMNS["comment"]
        types = dict.fromkeys(("user_id", room, time, "content"))
        for batch in self._reader.batches(self.files["comment"], types, multiline=True):
            first = batch.first_row - 1
            columns = {
                "item_id": _items(batch, room, _LIVE),
                "user_id": batch.ids("user_id"),
                "time_ms": batch.times(time, shanghai_time.TIMEZONE),
            }
            new = first_occurrences(known, line_hash({**columns, "text": _text_hash(batch)}))
            columns["comment_id"] = np.arange(first, first + batch.rows)
            columns["likes"] = np.zeros(batch.rows, np.int64)
            yield pa.table({**columns, "text": batch.text("content")}).filter(pa.array(new))

    def segments(self) -> Iterator[pa.Table]:
        """Yield ``segments.parquet``, batch by batch: room and time of availability of each segment vector."""
        first = 0
        for file in self.segment_files:
            for batch in self._reader.batches(file, dict.fromkeys(("live_stream_id", "timestamp"))):
                item_id = _items(batch, "live_stream_id", _LIVE)
                vector = np.arange(first, first + batch.rows)
                known_ms = batch.times("timestamp", shanghai_time.TIMEZONE)
                yield pa.table({"item_id": item_id, "vector": vector, "known_ms": known_ms})
                first += batch.rows

    def write_vectors(self, builder: DatasetBuilder) -> None:
        """Write the content vectors of videos and of segments."""
        file = self.files["video vectors"]
        ids = [_NO_IDS]
        known = IdIndex()
        for batch in read_column_batches(file, {"photo_id": None}):
            ids.append(_items(batch, "photo_id", _VIDEO))
            batch.require(first_occurrences(known, ids[-1]), "photo_id", _UNIQUE_ID)
        parts = self._reader.batches(file, {"photo_id": None, "feature": VECTORS})
        vectors = ((_items(batch, "photo_id", _VIDEO), read_vectors(batch, "feature", VECTOR_DIM)) for batch in parts)
        write_vectors(builder.folder(ITEM_VECTORS), np.concatenate(ids), vectors, VECTOR_DIM, file.name)
        count = sum(pq.read_metadata(file).num_rows for file in self.segment_files)
        folder, segments = builder.folder(SEGMENT_VECTORS), builder.segments_hash()
        write_vectors(folder, np.arange(count), self._segment_vectors(), VECTOR_DIM, _SEGMENTS, segments)

    def _segment_vectors(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield row numbers in ``segments.parquet`` and segment vectors ``[rows, VECTOR_DIM]``, batch by batch."""
        first = 0
        for file in self.segment_files:
            for batch in self._reader.batches(file, {"feature_128": VECTORS}):
                yield np.arange(first, first + batch.rows), read_vectors(batch, "feature_128", VECTOR_DIM)
                first += batch.rows

    def _visits(self, batch: ColumnBatch, id_column: str, domain: int, request_ms: np.ndarray) -> Columns:
        """Return the visits of a batch without any behaviour."""
        item_id = _items(batch, id_column, domain)
        first, self.exposed = self.exposed, self.exposed + batch.rows
        return {
            "visit_id": np.arange(first, self.exposed),
            "user_id": batch.ids("user_id"),
            "author_id": batch.ids("author_id"),
            "item_id": item_id,
            "domain": np.full(batch.rows, domain, np.int8),
            "request_ms": request_ms,
            "exit_ms": request_ms,
            "play_ms": np.zeros(batch.rows, np.int64),
            **no_behaviours(BEHAVIOURS, batch.rows),
            "hour": shanghai_time.hour_code(request_ms),
            "weekday": shanghai_time.weekday_code(request_ms),
            "log_room_age_s": shanghai_time.log_seconds_since(self._room_start.lookup(item_id), request_ms),
        }


def _spec(source: _KuaiLiveM3Files, vocabularies: dict[str, tuple[str, ...]], partitions: int) -> DatasetSpec:
    """Return the content of ``dataset.json`` before the logs are read."""
    sizes = {feature: len(values) + 1 for feature, values in vocabularies.items()}
    return DatasetSpec(
        name="KuaiLive-M3",
        source=SOURCE,
        licence=LICENCE,
        partitions=partitions,
        timezone=shanghai_time.TIMEZONE,
        behaviours=BEHAVIOURS,
        applies={name: DOMAINS if name in _OF_VIDEOS else ("live",) for name in BEHAVIOURS},
        candidates=("live",),
        side=(
            *(SideFeature(feature, "author", sizes[feature]) for feature in _AUTHOR_CATEGORIES.values()),
            *(SideFeature(feature, "item", sizes[feature]) for feature in _CATEGORIES.values()),
            SideFeature("hour", "context", 25),
            SideFeature("weekday", "context", 8),
        ),
        dense=(DenseFeature("log_room_age_s", "context"),),
        statistics=STATISTICS,
        tag="category_2",
        extra={
            "files": [*(file.name for file in source.files.values()), *(file.name for file in source.segment_files)],
            "vocabularies": {feature: list(values) for feature, values in vocabularies.items()},
            "codes": "0 is unknown; 1 + position in `vocabularies`; hour + 1; weekday 1 (Monday) to 7",
            "ids": "item_id = 2 * photo_id, or 2 * live_id + 1",
            "views": view_thresholds.FACTS,
        },
    )


def _items(batch: ColumnBatch, name: str, domain: int) -> np.ndarray:
    """Return the item ids of a column of room or video ids, ``[rows] int64``."""
    ids = batch.ids(name)
    batch.require(ids <= _LARGEST_ID, name, f"at most {_LARGEST_ID}")
    return 2 * ids + domain


def _item_tables(columns: Columns, texts: dict[str, pa.Array]) -> tuple[pa.Table, pa.Table]:
    """Return the rows of ``items`` and of ``texts/items``."""
    shared = ("item_id", "author_id", "domain", "duration_ms")
    return pa.table(columns), pa.table({name: columns[name] for name in shared} | texts)


def _item_columns(
    item_id: np.ndarray,
    author_id: np.ndarray,
    domain: int,
    start_ms: np.ndarray,
    duration_ms: np.ndarray,
    *categories: np.ndarray,
) -> Columns:
    """Return the columns of ``items``; ``categories`` are codes in the order of ``_CATEGORIES``."""
    codes = {name: code.astype(np.int32) for name, code in zip(_CATEGORIES.values(), categories, strict=True)}
    columns = {"item_id": item_id, "author_id": author_id, "domain": np.full(len(item_id), domain, np.int8)}
    return {**columns, "start_ms": start_ms, "duration_ms": duration_ms, **codes}


def _text_hash(batch: ColumnBatch) -> np.ndarray:
    """Return a hash of the text of each comment, ``[rows] int64``."""
    hashes, which = text_hashes(batch.text("content"))
    return hashes[which, 0].view(np.int64)
