"""KuaiComt, as its authors publish it, to a canonical dataset: videos, their comments, and the time spent in those.

Read are ``user_video_inter.csv``, ``user_comment_inter.csv``, ``user_features.csv``, ``video_features.csv`` and
``comment_features.csv``, with commas or tabs, or under the names that the authors' own code reads them by. What the
files do not say plainly, and how it is taken:

* Times are milliseconds in one file and seconds in another: a number below 10^11 counts as seconds.
* A comment's interactions name no visit: each belongs to its user's latest visit to the video before it. Those without
  one are dropped and counted in ``extra.orphans_dropped``.
* Of several lines with one (user, video, time) the first stays.
* Which comments were shown is not published, nor when a comment was written: see ``comment_lists.py``.
* ``comment_like_cnt`` is a count as of an unknown day, so it is no feature; it is the ``likes`` of the comments.

Time in the comment area is taken to lie over the video, so a visit ends with its play time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.console.errors import UserError
from trainer.data.format.id_index import IdIndex
from trainer.data.format.schema import DOMAINS, DatasetSpec, DenseFeature, SideFeature
from trainer.data.format.sorting import first_of_each
from trainer.data.format.text_schema import UNKNOWN_TIME, UNKNOWN_USER, list_column
from trainer.data.importers import field_parsers, shanghai_time
from trainer.data.importers.category_codes import distinct, encode, vocabulary
from trainer.data.importers.columns import Part, Reading, read_parts
from trainer.data.importers.daily_top_comments import DailyLists
from trainer.data.importers.event_attribution import last_touch
from trainer.data.importers.id_lookup import IdValues, first_met
from trainer.data.importers.scratch_dir import scratch_folder
from trainer.data.importers.staytime_spill import Stays, in_parts
from trainer.data.importers.table_files import column_names
from trainer.data.writing.builder import DatasetBuilder, Progress
from trainer.data.writing.partition_spill import Spill

SOURCE = (
    "KuaiComt, 30 September to 3 November 2023: C. Zhang, Z. Lin, S. Liu, Y. Liu, H. Li. Comment Staytime Prediction "
    "with LLM-enhanced Comment Understanding. WWW 2025 Companion. https://github.com/lyingCS/KuaiComt.github.io"
)
LICENCE = "CC BY-NC-SA 4.0, under a signed confidentiality agreement with its authors"

BEHAVIOURS = {
    "click": "is_click",
    "long_view": "long_view",
    "like": "is_like",
    "comment": "is_comment",
    "follow": "is_follow",
    "forward": "is_forward",
    "collect": "is_collect",
    "hate": "is_hate",
}
"""Behaviour -> column of the log."""

STATISTICS = (("user",), ("item",), ("author",), ("category",), ("user", "category"), ("user", "author"), ("hour",))

_FILES = {
    "visits": ("user_video_inter.csv", "user_photo_final_filtered_table.csv"),
    "touches": ("user_comment_inter.csv",),
    "users": ("user_features.csv", "user_table_final.csv"),
    "videos": ("video_features.csv", "photo_table_final.csv"),
    "comments": ("comment_features.csv",),
}
"""Each under the name of the description, and of the authors' code."""
_OTHER_NAMES = {"video_id": "photo_id", "photo_id": "video_id", "video_type": "photo_type"}
_USER_CATEGORIES = (
    "user_active_degree",
    "is_live_author",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    *(f"onehot_feat{number}" for number in range(21)),
)
_VIDEO_CATEGORIES = {"video_type": "video_type", "category": "category"}
_VIDEO = DOMAINS.index("video")
_NEW = "an id that did not come before"
_SECONDS_BELOW = 1e11
"""As milliseconds this is March 1973."""

_TOUCHES = pa.schema([(name, pa.int64()) for name in ("user_id", "item_id", "time_ms", "comment_id")])


def import_kuaicomt(
    src: str | Path, out: str | Path, partitions: int = 16, progress: Progress | None = None
) -> DatasetSpec:
    """Build a dataset from a folder of KuaiComt.

    The files pass through in blocks; the log waits on disk until its interactions with comments are joined. In memory
    are the visits of one partition, 32 bytes a comment, 160 bytes for each video and day, and what the builder needs.

    Args:
        src: the unpacked folder.
        out: the dataset to make; must not exist.
        partitions: number of partitions; memory is that of the largest.
        progress: told about the work as it goes.

    Returns:
        The description of the dataset.

    Raises:
        UserError: a file or column is missing, or a value is not what it should be, such as a negative staytime or a
            comment id that comes twice; names file, row, column and value.
    """
    source = _Source(Path(src), progress)
    spec = _spec(source, partitions)
    with DatasetBuilder(out, spec, deduplicate=("user_id", "item_id", "request_ms")) as builder:
        for table in source.users():
            builder.table("users", table)
        for table, texts in source.videos():
            builder.table("items", table)
            builder.texts("items", texts)
        for texts in source.comments():
            builder.texts("comments", texts)
        with scratch_folder(out) as folder:
            stays, touches = Stays(folder / "stays", partitions), Spill(folder / "touches", _TOUCHES, partitions)
            for visits, columns in source.visits():
                builder.visits(visits)
                stays.add(columns)
            if not source.rows:
                raise UserError(f"{source.files['visits']}: has no lines below its header")
            lists = source.read_touches(touches)
            orphans = _join(builder, stays, touches, lists, progress)
        return builder.finish(progress, {"log_rows": source.rows, "orphans_dropped": orphans})


def _join(builder: DatasetBuilder, stays: Stays, touches: Spill, lists: DailyLists, progress: Progress | None) -> int:
    """Give the builder all staytimes with their comments; returns the number of interactions without a visit."""
    report = progress or (lambda what, done, total: None)
    touches.flush()
    orphans = 0
    for partition in range(stays.partitions):
        report("joining comments", partition, stays.partitions)
        visits, touched = stays.pop(partition), touches.pop(partition)
        visit = last_touch(visits, touched)
        orphans += int((visit < 0).sum())
        visit, comment = visit[visit >= 0], touched["comment_id"][visit >= 0]
        own = first_of_each([comment, visit])
        order = own[np.argsort(visit[own], kind="stable")]
        edges = np.searchsorted(visit[order], np.arange(len(visits["visit_id"]) + 1))
        for rows in in_parts(len(visits["visit_id"])):
            some = {name: column[rows] for name, column in visits.items()}
            shown, counts = lists.of(some["item_id"], shanghai_time.local_day(some["request_ms"]))
            offsets = np.concatenate([[0], np.cumsum((shown >= 0).sum(axis=1))])
            of_rows = edges[rows.start : rows.stop + 1]
            lines = {
                "shown": list_column(shown[shown >= 0], offsets),
                "shown_likes": list_column(counts[shown >= 0], offsets),
                "interacted": list_column(comment[order][of_rows[0] : of_rows[-1]], of_rows - of_rows[0]),
            }
            builder.texts("visits", pa.table(some | lines))
    report("joining comments", stays.partitions, stays.partitions)
    return orphans


class _Source:
    """The files, and what has to be remembered from one to the next."""

    def __init__(self, folder: Path, progress: Progress | None) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; unpack KuaiComt.zip and give its folder")
        self.files: dict[str, Path] = {}
        for name, names in _FILES.items():
            there = [folder / one for one in names if (folder / one).is_file()]
            if not there:
                raise UserError(f"{folder / names[0]}: is missing; it is one of the files that KuaiComt consists of")
            self.files[name] = there[0]
        self._reading = Reading(self.files.values(), progress)
        self._author = IdValues(missing=-1)
        self._item_of_comment = IdValues(missing=-1)
        self._comments = [(np.empty(0, np.int64), np.empty(0, np.int64))]
        self._days = (np.iinfo(np.int64).max, np.iinfo(np.int64).min)
        self.rows = 0

    @cached_property
    def vocabularies(self) -> dict[str, tuple[str, ...]]:
        """Values of the categories, by feature."""
        values: dict[str, set[str]] = {}
        for name, features in (("users", {name: name for name in _USER_CATEGORIES}), ("videos", _VIDEO_CATEGORIES)):
            own = {self._own(name, column): feature for column, feature in features.items()}
            for part in read_parts(self.files[name], dict.fromkeys(own), multiline=True):
                for column, feature in own.items():
                    values.setdefault(feature, set()).update(distinct([part.column(column)]))
        return {feature: vocabulary(found) for feature, found in values.items()}

    def users(self) -> Iterator[pa.Table]:
        """The table of users."""
        types = {"user_id": pa.int64(), **dict.fromkeys(_USER_CATEGORIES), "register_days": None}
        known = IdIndex()
        for part in self._reading.parts(self.files["users"], types):
            ids = part.ids("user_id")
            part.require(first_met(known, ids), "user_id", _NEW)
            codes = {name: encode(part.column(name), self.vocabularies[name]) for name in _USER_CATEGORIES}
            days = np.log1p(np.maximum(part.numbers("register_days"), 0)).astype(np.float32)
            yield pa.table({"user_id": ids, **codes, "log_register_days": days})

    def videos(self) -> Iterator[tuple[pa.Table, pa.Table]]:
        """The table of items, and that of their texts."""
        key, kind = self._own("videos", "video_id"), self._own("videos", "video_type")
        types = dict.fromkeys((key, "author_id"), pa.int64()) | dict.fromkeys((kind, "category", "caption", "duration"))
        known = IdIndex()
        for part in self._reading.parts(self.files["videos"], types, multiline=True):
            ids, author, duration_ms = part.ids(key), part.ids("author_id"), part.milliseconds("duration")
            part.require(first_met(known, ids), key, _NEW)
            self._author.add(ids, author)
            columns = {"item_id": ids, "author_id": author, "domain": np.full(part.rows, _VIDEO, np.int8)}
            texts = {"duration_ms": duration_ms, "tag": _text(part, "category"), "text": _text(part, "caption")}
            codes = {
                "video_type": encode(part.column(kind), self.vocabularies["video_type"]),
                "category": encode(part.column("category"), self.vocabularies["category"]),
                "log_duration": np.log1p(duration_ms / 1_000).astype(np.float32),
            }
            yield pa.table(columns | codes), pa.table(columns | texts)

    def comments(self) -> Iterator[pa.Table]:
        """The table of comments."""
        key = self._own("comments", "video_id")
        types = dict.fromkeys(("comment_id", key), pa.int64()) | dict.fromkeys(("comment_content", "comment_like_cnt"))
        known = IdIndex()
        for part in self._reading.parts(self.files["comments"], types, multiline=True):
            ids, item = part.ids("comment_id"), part.ids(key)
            part.require(first_met(known, ids), "comment_id", _NEW)
            likes = part.numbers("comment_like_cnt")
            part.require(likes >= 0, "comment_like_cnt", "0 or more")
            self._comments.append((ids, item))
            self._item_of_comment.add(ids, item)
            yield pa.table(
                {
                    "comment_id": ids,
                    "item_id": item,
                    "user_id": np.full(part.rows, UNKNOWN_USER),
                    "time_ms": np.full(part.rows, UNKNOWN_TIME),
                    "likes": likes.astype(np.int64),
                    "text": _text(part, "comment_content"),
                }
            )

    def visits(self) -> Iterator[tuple[pa.Table, dict[str, np.ndarray]]]:
        """Visits, and the same with their staytimes for ``Stays``; ``visit_id`` is the number of the line, from 0."""
        key = self._own("visits", "video_id")
        types = dict.fromkeys(("user_id", key), pa.int64())
        types |= dict.fromkeys(("time_ms", "play_time_ms", "comment_stay_time", *BEHAVIOURS.values()))
        for part in self._reading.parts(self.files["visits"], types):
            item, request_ms = part.ids(key), _times(part, "time_ms")
            author, play_ms = self._author.of(item), part.milliseconds("play_time_ms")
            part.require(author >= 0, key, f"a video of {self.files['videos'].name}")
            keys = {
                "visit_id": np.arange(self.rows, self.rows + part.rows),
                "user_id": part.ids("user_id"),
                "item_id": item,
                "request_ms": request_ms,
            }
            visits = keys | {
                "author_id": author,
                "domain": np.full(part.rows, _VIDEO, np.int8),
                "exit_ms": request_ms + play_ms,
                "play_ms": play_ms,
                "hour": shanghai_time.hour_code(request_ms),
                "weekday": shanghai_time.weekday_code(request_ms),
            }
            for behaviour, column in BEHAVIOURS.items():
                happens = 0 if behaviour == "click" else play_ms
                visits[f"delay_{behaviour}"] = np.where(part.numbers(column) > 0, happens, -1).astype(np.int32)
            self.rows += part.rows
            for day in shanghai_time.local_day(request_ms[[request_ms.argmin(), request_ms.argmax()]]).tolist():
                self._days = min(self._days[0], day), max(self._days[1], day)
            yield pa.table(visits), keys | {"staytime_ms": part.milliseconds("comment_stay_time")}

    def read_touches(self, touches: Spill) -> DailyLists:
        """Set interactions with comments aside; returns the comments at the top of each video on each day."""
        key = self._own("touches", "photo_id")
        types = dict.fromkeys(("user_id", "comment_id", key), pa.int64())
        types |= dict.fromkeys(("time_stamp", "is_like", "is_reply"))
        met = [(np.empty(0, np.int64), np.empty(0, np.int64))]
        for part in self._reading.parts(self.files["touches"], types):
            comment, item = part.ids("comment_id"), part.ids(key)
            part.require(
                self._item_of_comment.of(comment) == item,
                "comment_id",
                f"a comment of {key} {self.files['comments'].name}",
            )
            # a second that began before the visit's millisecond may have ended after it
            time_ms = _times(part, "time_stamp", late_ms=999)
            happened = (part.numbers("is_like") > 0) | (part.numbers("is_reply") > 0)
            columns = {"user_id": part.ids("user_id"), "item_id": item, "time_ms": time_ms, "comment_id": comment}
            touches.add({name: column[happened] for name, column in columns.items()})
            met.append((comment[happened], shanghai_time.local_day(time_ms[happened])))
        touched, day = (np.concatenate(column) for column in zip(*met, strict=True))
        comment_id, item_id = (np.concatenate(column) for column in zip(*self._comments, strict=True))
        return DailyLists(comment_id, item_id, touched, day, *self._days)

    def _own(self, name: str, column: str) -> str:
        """What a file calls a column; the published name where it has neither, which reading it then says."""
        other = _OTHER_NAMES.get(column, column)
        names = column_names(self.files[name])
        return other if other in names and column not in names else column


def _times(part: Part, name: str, late_ms: int = 0) -> np.ndarray:
    """Seconds or milliseconds since 1970 as milliseconds, ``[rows] int64``; ``late_ms`` is added to seconds."""

    def read(values: pa.Array) -> pa.Array:
        numbers = field_parsers.numbers(values).to_numpy(zero_copy_only=False)
        seconds = numbers < _SECONDS_BELOW
        times_ms = np.where(seconds, 1_000 * numbers + late_ms, numbers)
        return field_parsers.times_ms(pa.array(times_ms), "ms", shanghai_time.TIMEZONE)

    return part.convert(name, read, "a time between 2000 and 2100, in milliseconds or seconds since 1970")


def _text(part: Part, name: str) -> pa.Array:
    return pc.fill_null(part.column(name).cast(pa.string()), "")


def _spec(source: _Source, partitions: int) -> DatasetSpec:
    known = source.vocabularies
    return DatasetSpec(
        name="KuaiComt",
        source=SOURCE,
        licence=LICENCE,
        partitions=partitions,
        timezone=shanghai_time.TIMEZONE,
        behaviours=tuple(BEHAVIOURS),
        applies={behaviour: ("video",) for behaviour in BEHAVIOURS},
        candidates=("video",),
        side=(
            *(SideFeature(name, "user", len(known[name]) + 1) for name in _USER_CATEGORIES),
            *(SideFeature(name, "item", len(known[name]) + 1) for name in _VIDEO_CATEGORIES.values()),
            SideFeature("hour", "context", 25),
            SideFeature("weekday", "context", 8),
        ),
        dense=(DenseFeature("log_duration", "item"), DenseFeature("log_register_days", "user")),
        statistics=STATISTICS,
        tag="category",
        extra={
            "files": [file.name for file in source.files.values()],
            "vocabularies": {feature: list(values) for feature, values in known.items()},
            "codes": "0 is unknown; 1 + position in `vocabularies`; hour + 1; weekday 1 (Monday) to 7",
        },
    )
