"""KuaiLive-M3, as its authors publish it, to a canonical dataset of both domains: live rooms and short videos.

Candidates are live rooms, entered (``live_interaction.csv``) or only shown (``live_show.parquet``); short videos
(``photo_play.parquet``) feed the histories. Room and video ids may be equal numbers, so an item's id is twice the
published id, and one more for a room. How the rest is taken:

* Likes, comments and shares have times of their own and belong to their user's latest visit of the room before them
  (``sessions.py``); those without one are dropped and counted in ``extra.orphans_dropped``. Behaviours that the visit's
  line counts without such an event, gifts and follows among them, are put at the visit's end.
* ``click`` is a room that was entered and not by autoplay. A gift's value is the number of gifts: prices are not
  published. Views are derived from the time watched by the thresholds in ``views.py``.
* The codes of ``like_status_type`` are not published, so videos have views and follows only.
* Comment texts, titles and subtitles become the dataset's texts (text_schema.py), video vectors
  ``embeddings/items``, segment vectors ``embeddings/segments`` by the number of the line in ``segments.parquet``.

No feature knows what was not known at its request. Left out, with the reason:

==================================  ===================================================================================
``live_emb_64``                     made of the whole broadcast, its future included; rooms have no item vector. Segment
                                    vectors are known from ``known_ms``, the segment's end, on
room ``end_timestamp``,             the future. There is no position in the room relative to its length, only
``live_duration``                   ``log_room_age_s``
``live_source_category``,           stand in the lines of entered rooms only: having one would tell that the room was
``enter_live_action``,              entered
``is_follow_enter``
``play_duration``, all counts,      the outcome
``is_follow_leave``
``fans_user_num``,                  of an unknown day, or of the whole period: an author who is to go live has the flag
``is_live_author``,                 before
``is_photo_author``
``photo_interaction.csv``,          have no time at all
``live_questionnaire.csv``
==================================  ===================================================================================

Which segments are published depends on the future too: only those with a viewer are.
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
from trainer.data.format.id_index import IdIndex
from trainer.data.format.schema import DOMAINS, DatasetSpec, DenseFeature, SideFeature
from trainer.data.format.validation import Columns
from trainer.data.importers import shanghai_time, view_thresholds
from trainer.data.importers.category_codes import distinct, encode, vocabulary
from trainer.data.importers.columns import Part, Reading, read_parts
from trainer.data.importers.event_attribution import EventJoin, add_joined, no_behaviours
from trainer.data.importers.id_lookup import IdValues, first_met
from trainer.data.importers.published_vectors import ITEM_VECTORS, SEGMENT_VECTORS, vectors_of, write_vectors
from trainer.data.importers.scratch_dir import scratch_folder
from trainer.data.writing.builder import DatasetBuilder, Progress

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
"""Behaviour -> how often it happened in a visit, a column of ``live_interaction.csv``."""
_EVENT_COLUMNS = {
    "like": ("live_id", "like_timestamp"),
    "comment": ("live_stream_id", "comment_ts"),
    "share": ("live_id", "share_timestamp"),
}
"""Behaviour -> columns of its own file: room and time."""
_AUTHOR_CATEGORIES = {"gender": "author_gender", "age_segment": "author_age"}
_CATEGORIES = {"first_level_category_name": "category_1", "second_level_category_name": "category_2"}
_MISSING = ("", "U", "UNKNOWN", "unknown")
_NEW = "an id that did not come before"
_NO_IDS = np.empty(0, np.int64)


def import_kuailive_m3(
    src: str | Path, out: str | Path, partitions: int = 16, progress: Progress | None = None
) -> DatasetSpec:
    """Build a dataset from a folder of KuaiLive-M3.

    All files pass through in blocks, and the logs of live rooms wait on disk. In memory are the room visits and events
    of one partition, 16 bytes a room and 48 a video (430 MB for all of KuaiLive-M3), and what the builder needs.

    Args:
        src: the downloaded folder.
        out: the dataset to make; must not exist.
        partitions: number of partitions; memory is that of the largest.
        progress: told about the work as it goes.

    Returns:
        The description of the dataset.

    Raises:
        UserError: a file or column is missing, or a value is not what it should be; names file, row and column.
    """
    source = _Source(Path(src), progress)
    vocabularies = source.vocabularies()
    spec = _spec(source, vocabularies, partitions)
    with DatasetBuilder(out, spec, deduplicate=("user_id", "item_id", "request_ms")) as builder:
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


class _Source:
    """The files, and what has to be remembered from one to the next."""

    def __init__(self, folder: Path, progress: Progress | None) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; download KuaiLive-M3 and give its folder")
        self.files = {what: folder / name for what, name in _FILES.items()}
        for file in self.files.values():
            if not file.is_file():
                raise UserError(f"{file}: is missing; it is one of the files that KuaiLive-M3 consists of")
        self.segment_files = tuple(sorted((folder / _SEGMENTS).glob("*.parquet")))
        if not self.segment_files:
            raise UserError(f"{folder / _SEGMENTS}: no *.parquet here; KuaiLive-M3 has the vectors of segments there")
        self.exposed = 0
        self._reading = Reading((*self.files.values(), *self.segment_files), progress)
        self._room_start = IdValues(missing=-1)
        self._duration = IdValues(missing=0)

    def vocabularies(self) -> dict[str, tuple[str, ...]]:
        """Values of the categories, by feature."""
        values: dict[str, set[str]] = {}
        for what, features in (("authors", _AUTHOR_CATEGORIES), ("tags", _CATEGORIES)):
            for part in read_parts(self.files[what], dict.fromkeys(features)):
                for column, feature in features.items():
                    values.setdefault(feature, set()).update(distinct([part.column(column)], _MISSING))
        return {feature: vocabulary(found) for feature, found in values.items()}

    def authors(self, vocabularies: dict[str, tuple[str, ...]]) -> Iterator[pa.Table]:
        """The table of authors."""
        known = IdIndex()
        types = {"author_id": pa.int64(), **dict.fromkeys(_AUTHOR_CATEGORIES)}
        for part in self._reading.parts(self.files["authors"], types):
            ids = part.ids("author_id")
            part.require(first_met(known, ids), "author_id", _NEW)
            codes = {name: encode(part.column(own), vocabularies[name]) for own, name in _AUTHOR_CATEGORIES.items()}
            yield pa.table({"author_id": ids, **codes})

    def rooms(self) -> Iterator[tuple[pa.Table, pa.Table]]:
        """The rooms for the tables of items and of their texts; each once, though a long one has a line a day."""
        known = IdIndex()
        types = dict.fromkeys(("live_id", "author_id", "start_timestamp", "live_name"))
        for part in self._reading.parts(self.files["rooms"], types):
            item_id, start_ms = _items(part, "live_id", _LIVE), part.times("start_timestamp", shanghai_time.TIMEZONE)
            first = first_met(known, item_id)
            self._room_start.add(item_id[first], start_ms[first])
            nothing = np.zeros(part.rows, np.int64)
            columns = _item_columns(item_id, part.ids("author_id"), _LIVE, start_ms, nothing, nothing, nothing)
            texts = {"tag": pa.array([""] * part.rows), "text": _text(part.column("live_name"))}
            yield tuple(table.filter(first) for table in _item_tables(columns, texts))

    def videos(self, vocabularies: dict[str, tuple[str, ...]]) -> Iterator[tuple[pa.Table, pa.Table]]:
        """The videos, likewise."""
        codes = {feature: IdValues(missing=0) for feature in _CATEGORIES.values()}
        known = IdIndex()
        for part in self._reading.parts(self.files["tags"], {"photo_id": pa.int64(), **dict.fromkeys(_CATEGORIES)}):
            item_id = _items(part, "photo_id", _VIDEO)
            part.require(first_met(known, item_id), "photo_id", _NEW)
            for column, feature in _CATEGORIES.items():
                codes[feature].add(item_id, encode(part.column(column), vocabularies[feature]).astype(np.int64))
        known = IdIndex()
        names = pa.array(["", *vocabularies["category_2"]])
        types = dict.fromkeys(("photo_id", "author_id", "duration", "cover_title", "video_texts"))
        for part in self._reading.parts(self.files["videos"], types):
            item_id, duration_ms = _items(part, "photo_id", _VIDEO), part.milliseconds("duration")
            part.require(first_met(known, item_id), "photo_id", _NEW)
            self._duration.add(item_id, duration_ms)
            category = [codes[feature].of(item_id) for feature in _CATEGORIES.values()]
            nothing = np.zeros(part.rows, np.int64)
            columns = _item_columns(item_id, part.ids("author_id"), _VIDEO, nothing, duration_ms, *category)
            title, inside = (_text(part.column(name)) for name in ("cover_title", "video_texts"))
            text = pc.utf8_trim_whitespace(pc.binary_join_element_wise(title, inside, "\n"))
            yield _item_tables(columns, {"tag": names.take(pa.array(category[1])), "text": text})

    def sessions(self) -> Iterator[Columns]:
        """Visits to rooms as far as their own lines tell, part by part."""
        start, end = "live_play_start_timestamp", "live_play_end_timestamp"
        columns = ("user_id", "author_id", "live_id", start, end, "is_auto_play", "play_duration", "send_gift_num")
        for part in self._reading.parts(self.files["sessions"], dict.fromkeys((*columns, *_COUNTED.values()))):
            request_ms, end_ms = part.times(start, shanghai_time.TIMEZONE), part.times(end, shanghai_time.TIMEZONE)
            part.require(end_ms >= request_ms, end, f"no earlier than {start}")
            play_ms = part.milliseconds("play_duration")
            exit_ms = np.maximum(end_ms, request_ms + play_ms)
            length = exit_ms - request_ms
            part.require(length < 1 << 31, end, f"less than 2^31 ms after {start}")
            visits = self._visits(part, "live_id", _LIVE, request_ms) | {"exit_ms": exit_ms, "play_ms": play_ms}
            visits |= view_thresholds.live_view_delays(play_ms)
            visits["delay_click"] = np.where(part.numbers("is_auto_play") > 0, -1, 0).astype(np.int32)
            for behaviour, count in _COUNTED.items():
                visits[f"delay_{behaviour}"] = np.where(part.numbers(count) > 0, length, -1).astype(np.int32)
            visits["value_gift"] = part.numbers("send_gift_num").astype(np.float32)
            yield visits

    def shows(self) -> Iterator[Columns]:
        """Rooms that were shown and not entered, part by part."""
        types = dict.fromkeys(("user_id", "author_id", "live_id", "show_timestamp"))
        for part in self._reading.parts(self.files["shows"], types):
            request_ms = part.times("show_timestamp", shanghai_time.TIMEZONE)
            yield self._visits(part, "live_id", _LIVE, request_ms)

    def plays(self) -> Iterator[Columns]:
        """Visits to videos, part by part."""
        start, end = "enter_timestamp", "leave_timestamp"
        flags = ("is_complete_play", "is_follow_before_play", "is_follow_after_play")
        types = dict.fromkeys(("user_id", "author_id", "photo_id", start, end, *flags))
        for part in self._reading.parts(self.files["plays"], types):
            request_ms, exit_ms = part.times(start, shanghai_time.TIMEZONE), part.times(end, shanghai_time.TIMEZONE)
            part.require(exit_ms >= request_ms, end, f"no earlier than {start}")
            play_ms = exit_ms - request_ms
            part.require(play_ms < 1 << 31, end, f"less than 2^31 ms after {start}")
            visits = self._visits(part, "photo_id", _VIDEO, request_ms) | {"exit_ms": exit_ms, "play_ms": play_ms}
            complete, before, after = (part.numbers(flag) > 0 for flag in flags)
            visits |= view_thresholds.video_view_delays(play_ms, self._duration.of(visits["item_id"]), complete)
            visits["delay_follow"] = np.where(after & ~before, play_ms, -1).astype(np.int32)
            yield visits

    def events(self, behaviour: str) -> Iterator[Columns]:
        """Likes, comments or shares, part by part."""
        room, time = _EVENT_COLUMNS[behaviour]
        types = dict.fromkeys(("user_id", room, time, *(["is_share_success"] if behaviour == "share" else [])))
        for part in self._reading.parts(self.files[behaviour], types, multiline=behaviour == "comment"):
            columns = {"user_id": part.ids("user_id"), "item_id": _items(part, room, _LIVE)}
            columns["time_ms"] = part.times(time, shanghai_time.TIMEZONE)
            if behaviour == "share":
                happened = part.numbers("is_share_success") > 0
                columns = {name: column[happened] for name, column in columns.items()}
            yield columns

    def comments(self) -> Iterator[pa.Table]:
        """The table of comment texts; a comment's id is the number of its line, from 0."""
        room, time = _EVENT_COLUMNS["comment"]
        types = dict.fromkeys(("user_id", room, time, "content"))
        for part in self._reading.parts(self.files["comment"], types, multiline=True):
            first = part.first_row - 1
            yield pa.table(
                {
                    "comment_id": np.arange(first, first + part.rows),
                    "item_id": _items(part, room, _LIVE),
                    "user_id": part.ids("user_id"),
                    "time_ms": part.times(time, shanghai_time.TIMEZONE),
                    "likes": np.zeros(part.rows, np.int64),
                    "text": _text(part.column("content")),
                }
            )

    def segments(self) -> Iterator[pa.Table]:
        """``segments.parquet``: the room of each segment vector, and from when on it is known."""
        first = 0
        for file in self.segment_files:
            for part in self._reading.parts(file, dict.fromkeys(("live_stream_id", "timestamp"))):
                item_id = _items(part, "live_stream_id", _LIVE)
                vector = np.arange(first, first + part.rows)
                known_ms = part.times("timestamp", shanghai_time.TIMEZONE)
                yield pa.table({"item_id": item_id, "vector": vector, "known_ms": known_ms})
                first += part.rows

    def write_vectors(self, builder: DatasetBuilder) -> None:
        """The embedding tables of videos and of segments."""
        file = self.files["video vectors"]
        ids = [_items(part, "photo_id", _VIDEO) for part in read_parts(file, {"photo_id": None})]
        parts = self._reading.parts(file, dict.fromkeys(("photo_id", "feature")))
        vectors = ((_items(part, "photo_id", _VIDEO), vectors_of(part, "feature", VECTOR_DIM)) for part in parts)
        write_vectors(builder.folder(ITEM_VECTORS), np.concatenate([_NO_IDS, *ids]), vectors, VECTOR_DIM, file.name)
        count = sum(pq.read_metadata(file).num_rows for file in self.segment_files)
        write_vectors(builder.folder(SEGMENT_VECTORS), np.arange(count), self._segment_vectors(), VECTOR_DIM, _SEGMENTS)

    def _segment_vectors(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        first = 0
        for file in self.segment_files:
            for part in self._reading.parts(file, {"feature_128": None}):
                yield np.arange(first, first + part.rows), vectors_of(part, "feature_128", VECTOR_DIM)
                first += part.rows

    def _visits(self, part: Part, id_column: str, domain: int, request_ms: np.ndarray) -> Columns:
        """Visits of a part in which nothing has happened yet."""
        item_id = _items(part, id_column, domain)
        first, self.exposed = self.exposed, self.exposed + part.rows
        return {
            "visit_id": np.arange(first, self.exposed),
            "user_id": part.ids("user_id"),
            "author_id": part.ids("author_id"),
            "item_id": item_id,
            "domain": np.full(part.rows, domain, np.int8),
            "request_ms": request_ms,
            "exit_ms": request_ms,
            "play_ms": np.zeros(part.rows, np.int64),
            **no_behaviours(BEHAVIOURS, part.rows),
            "hour": shanghai_time.hour_code(request_ms),
            "weekday": shanghai_time.weekday_code(request_ms),
            "log_room_age_s": shanghai_time.log_seconds_since(self._room_start.of(item_id), request_ms),
        }


def _spec(source: _Source, vocabularies: dict[str, tuple[str, ...]], partitions: int) -> DatasetSpec:
    rows = {feature: len(values) + 1 for feature, values in vocabularies.items()}
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
            *(SideFeature(feature, "author", rows[feature]) for feature in _AUTHOR_CATEGORIES.values()),
            *(SideFeature(feature, "item", rows[feature]) for feature in _CATEGORIES.values()),
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


def _items(part: Part, name: str, domain: int) -> np.ndarray:
    """Item ids of a column of room or video ids, ``[rows] int64``."""
    ids = part.ids(name)
    part.require(ids <= _LARGEST_ID, name, f"at most {_LARGEST_ID}")
    return 2 * ids + domain


def _item_tables(columns: Columns, texts: dict[str, pa.Array]) -> tuple[pa.Table, pa.Table]:
    """Lines of ``items`` and of ``texts/items``."""
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
    codes = {name: code.astype(np.int32) for name, code in zip(_CATEGORIES.values(), categories, strict=True)}
    columns = {"item_id": item_id, "author_id": author_id, "domain": np.full(len(item_id), domain, np.int8)}
    return {**columns, "start_ms": start_ms, "duration_ms": duration_ms, **codes}


def _text(values: pa.Array) -> pa.Array:
    return pc.fill_null(values.cast(pa.string()), "")
