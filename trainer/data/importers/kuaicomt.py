"""Importer of KuaiComt as its authors publish it: videos, their comments, and the time that users spend in them.

It reads ``user_video_inter.csv``, ``user_comment_inter.csv``, ``user_features.csv``, ``video_features.csv`` and
``comment_features.csv``, separated by commas or tabs; files may also have the names that the authors' own code uses.
The files leave some points open; they are treated like this:

* Times are milliseconds in one file and seconds in another: a number below 10^11 counts as seconds.
* Interactions with comments do not name a visit. Each belongs to the user's latest earlier visit to the video.
  Interactions without such a visit are dropped and counted in ``extra.orphans_dropped``.
* Of several lines with the same (user, video, time) the first is kept.
* It is not published which comments were shown, nor when a comment was written: see ``daily_top_comments.py``.
* ``comment_like_cnt`` is a count of an unknown day, so it is not a feature. It becomes the ``likes`` of the comments.

The comment area is assumed to lie over the playing video, so a visit ends with its play time.
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
from trainer.data.format.times import times_ms
from trainer.data.importers import field_parsers, shanghai_time
from trainer.data.importers.category_codes import vocabulary
from trainer.data.importers.columns import ColumnBatch, SourceReader, read_column_batches
from trainer.data.importers.daily_top_comments import DailyTopComments
from trainer.data.importers.event_attribution import last_touch
from trainer.data.importers.id_lookup import IdLookup, first_occurrences
from trainer.data.importers.null_markers import VALUE_NULLS, without_markers
from trainer.data.importers.scratch_dir import scratch_folder
from trainer.data.importers.staytime_spill import StaytimeSpill, row_slices
from trainer.data.importers.table_files import column_names
from trainer.data.writing.builder import DatasetBuilder, Progress
from trainer.data.writing.duplicates import DuplicateRule, find_duplicates
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
"""Columns of the log by behaviour."""

STATISTICS = (("user",), ("item",), ("author",), ("category",), ("user", "category"), ("user", "author"), ("hour",))

_FILES = {
    "visits": ("user_video_inter.csv", "user_photo_final_filtered_table.csv"),
    "interactions": ("user_comment_inter.csv",),
    "users": ("user_features.csv", "user_table_final.csv"),
    "videos": ("video_features.csv", "photo_table_final.csv"),
    "comments": ("comment_features.csv",),
}
"""Names of each file: in the published description, and in the authors' code."""
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
_UNIQUE_ID = "an id that occurs only once"
_SECONDS_BELOW = 1e11
"""Limit below which a time is in seconds. As milliseconds it is March 1973, long before the log."""

_INTERACTIONS = pa.schema([(name, pa.int64()) for name in ("user_id", "item_id", "time_ms", "comment_id", "kind")])


def import_kuaicomt(
    src: str | Path, out: str | Path, partitions: int = 16, progress: Progress | None = None
) -> DatasetSpec:
    """Build a dataset from a folder of KuaiComt.

    The files are read in blocks; the log is spilled to disk until its interactions with comments are joined. Memory
    holds the visits of one partition, 32 bytes per comment, 160 bytes for each video and day, and what the builder
    needs.

    Args:
        src: the unpacked folder.
        out: the dataset to make; must not exist.
        partitions: number of partitions; the largest one must fit in memory.
        progress: callback that gets the name of a phase, the work done and the total work.

    Returns:
        The description of the dataset.

    Raises:
        UserError: a file or column is missing, or a value is bad, such as a negative staytime or a comment id that
            occurs twice; names file, row, column and value.
    """
    source = _KuaiComtFiles(Path(src), progress)
    spec = _spec(source, partitions)
    with DatasetBuilder(out, spec, duplicates=DuplicateRule()) as builder:
        for table in source.users():
            builder.table("users", table)
        for table, texts in source.videos():
            builder.table("items", table)
            builder.texts("items", texts)
        for texts in source.comments():
            builder.texts("comments", texts)
        with scratch_folder(out) as folder:
            staytimes = StaytimeSpill(folder / "stays", partitions)
            interactions = Spill(folder / "interactions", _INTERACTIONS, partitions)
            for visits, columns in source.visits():
                builder.visits(visits)
                staytimes.add(columns)
            if not source.rows:
                raise UserError(f"{source.files['visits']}: has no lines below its header")
            lines = Spill(folder / "lines", _INTERACTIONS, partitions)
            source.read_interactions(lines)
            top_comments = source.top_comments(lines, interactions, builder)
            orphans = _join(builder, staytimes, interactions, top_comments, progress)
        return builder.finish(progress, {"log_rows": source.rows, "orphans_dropped": orphans})


def _join(
    builder: DatasetBuilder,
    staytimes: StaytimeSpill,
    interactions: Spill,
    top_comments: DailyTopComments,
    progress: Progress | None,
) -> int:
    """Pass all staytimes with their comments to the builder; return the number of interactions without a visit."""
    report = progress or (lambda what, done, total: None)
    interactions.flush()
    orphans = 0
    for partition in range(staytimes.partitions):
        report("joining comments", partition, staytimes.partitions)
        visits, interacted = staytimes.pop(partition), interactions.pop(partition)
        visit = last_touch(visits, interacted)
        orphans += int((visit < 0).sum())
        visit, comment = visit[visit >= 0], interacted["comment_id"][visit >= 0]
        # a user can like and answer the same comment; it is listed once per visit
        first = first_of_each([comment, visit])
        order = first[np.argsort(visit[first], kind="stable")]
        edges = np.searchsorted(visit[order], np.arange(len(visits["visit_id"]) + 1))
        for rows in row_slices(len(visits["visit_id"])):
            columns = {name: column[rows] for name, column in visits.items()}
            shown, counts = top_comments.lookup(columns["item_id"], shanghai_time.local_day(columns["request_ms"]))
            offsets = np.concatenate([[0], np.cumsum((shown >= 0).sum(axis=1))])
            row_edges = edges[rows.start : rows.stop + 1]
            list_columns = {
                "shown": list_column(shown[shown >= 0], offsets),
                "shown_likes": list_column(counts[shown >= 0], offsets),
                "interacted": list_column(comment[order][row_edges[0] : row_edges[-1]], row_edges - row_edges[0]),
            }
            builder.texts("visits", pa.table(columns | list_columns))
    report("joining comments", staytimes.partitions, staytimes.partitions)
    return orphans


class _KuaiComtFiles:
    """Reader of the files of KuaiComt; it keeps what later files need from earlier ones.

    Args:
        folder: the unpacked folder.
        progress: callback of ``SourceReader``.

    Raises:
        UserError: the folder or a file is missing.
    """

    def __init__(self, folder: Path, progress: Progress | None) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; unpack KuaiComt.zip and give its folder")
        self.files: dict[str, Path] = {}
        for name, names in _FILES.items():
            found = [folder / option for option in names if (folder / option).is_file()]
            if not found:
                raise UserError(f"{folder / names[0]}: is missing; it is one of the files of KuaiComt")
            self.files[name] = found[0]
        self._reader = SourceReader(self.files.values(), progress)
        self._author = IdLookup(missing=-1)
        self._item_of_comment = IdLookup(missing=-1)
        self._comments = [(np.empty(0, np.int64), np.empty(0, np.int64))]
        self._days = (np.iinfo(np.int64).max, np.iinfo(np.int64).min)
        self.rows = 0

    @cached_property
    def vocabularies(self) -> dict[str, tuple[str, ...]]:
        """Values of the categories, by feature."""
        values: dict[str, set[str]] = {}
        for name, features in (("users", {name: name for name in _USER_CATEGORIES}), ("videos", _VIDEO_CATEGORIES)):
            file_columns = {self._column_name(name, column): feature for column, feature in features.items()}
            for batch in read_column_batches(self.files[name], dict.fromkeys(file_columns), multiline=True):
                for column, feature in file_columns.items():
                    values.setdefault(feature, set()).update(batch.categories(column))
        return {feature: vocabulary(found) for feature, found in values.items()}

    def users(self) -> Iterator[pa.Table]:
        """Yield the table of users, batch by batch."""
        types = {"user_id": pa.int64(), **dict.fromkeys(_USER_CATEGORIES), "register_days": None}
        known = IdIndex()
        for batch in self._reader.batches(self.files["users"], types):
            ids = batch.ids("user_id")
            batch.require(first_occurrences(known, ids), "user_id", _UNIQUE_ID)
            codes = {name: batch.codes(name, self.vocabularies[name]) for name in _USER_CATEGORIES}
            days = np.log1p(np.maximum(batch.numbers("register_days"), 0)).astype(np.float32)
            yield pa.table({"user_id": ids, **codes, "log_register_days": days})

    def videos(self) -> Iterator[tuple[pa.Table, pa.Table]]:
        """Yield the table of items and that of their texts, batch by batch."""
        key, kind = self._column_name("videos", "video_id"), self._column_name("videos", "video_type")
        types = dict.fromkeys((key, "author_id"), pa.int64()) | dict.fromkeys((kind, "category", "caption", "duration"))
        known = IdIndex()
        for batch in self._reader.batches(self.files["videos"], types, multiline=True):
            ids, author, duration_ms = batch.ids(key), batch.ids("author_id"), batch.milliseconds("duration")
            batch.require(first_occurrences(known, ids), key, _UNIQUE_ID)
            self._author.add(ids, author)
            columns = {"item_id": ids, "author_id": author, "domain": np.full(batch.rows, _VIDEO, np.int8)}
            texts = {"duration_ms": duration_ms, "tag": _tag(batch), "text": batch.text("caption")}
            codes = {
                "video_type": batch.codes(kind, self.vocabularies["video_type"]),
                "category": batch.codes("category", self.vocabularies["category"]),
                "log_duration": np.log1p(duration_ms / 1_000).astype(np.float32),
            }
            yield pa.table(columns | codes), pa.table(columns | texts)

    def comments(self) -> Iterator[pa.Table]:
        """Yield the table of comments, batch by batch."""
        key = self._column_name("comments", "video_id")
        types = dict.fromkeys(("comment_id", key), pa.int64()) | dict.fromkeys(("comment_content", "comment_like_cnt"))
        known = IdIndex()
        for batch in self._reader.batches(self.files["comments"], types, multiline=True):
            ids, item = batch.ids("comment_id"), batch.ids(key)
            batch.require(first_occurrences(known, ids), "comment_id", _UNIQUE_ID)
            likes = batch.counts("comment_like_cnt")
            self._comments.append((ids, item))
            self._item_of_comment.add(ids, item)
            yield pa.table(
                {
                    "comment_id": ids,
                    "item_id": item,
                    "user_id": np.full(batch.rows, UNKNOWN_USER),
                    "time_ms": np.full(batch.rows, UNKNOWN_TIME),
                    "likes": likes,
                    "text": batch.text("comment_content"),
                }
            )

    def visits(self) -> Iterator[tuple[pa.Table, dict[str, np.ndarray]]]:
        """Yield visits, and their keys with staytimes for ``StaytimeSpill``, batch by batch.

        ``visit_id`` is the number of the line, from 0.
        """
        key = self._column_name("visits", "video_id")
        types = dict.fromkeys(("user_id", key), pa.int64())
        types |= dict.fromkeys(("time_ms", "play_time_ms", "comment_stay_time", *BEHAVIOURS.values()))
        for batch in self._reader.batches(self.files["visits"], types):
            item, request_ms = batch.ids(key), _times(batch, "time_ms")
            author, play_ms = self._author.lookup(item), batch.milliseconds("play_time_ms")
            batch.require(author >= 0, key, f"a video that is listed in {self.files['videos'].name}")
            keys = {
                "visit_id": np.arange(self.rows, self.rows + batch.rows),
                "user_id": batch.ids("user_id"),
                "item_id": item,
                "request_ms": request_ms,
            }
            visits = keys | {
                "author_id": author,
                "domain": np.full(batch.rows, _VIDEO, np.int8),
                "exit_ms": request_ms + play_ms,
                "play_ms": play_ms,
                "hour": shanghai_time.hour_code(request_ms),
                "weekday": shanghai_time.weekday_code(request_ms),
            }
            for behaviour, column in BEHAVIOURS.items():
                happens = 0 if behaviour == "click" else play_ms
                visits[f"delay_{behaviour}"] = np.where(batch.numbers(column) > 0, happens, -1).astype(np.int32)
            self.rows += batch.rows
            for day in shanghai_time.local_day(request_ms[[request_ms.argmin(), request_ms.argmax()]]).tolist():
                self._days = min(self._days[0], day), max(self._days[1], day)
            yield pa.table(visits), keys | {"staytime_ms": batch.milliseconds("comment_stay_time")}

    def read_interactions(self, lines: Spill) -> None:
        """Spill the interactions with comments to disk."""
        key = self._column_name("interactions", "photo_id")
        types = dict.fromkeys(("user_id", "comment_id", key), pa.int64())
        types |= dict.fromkeys(("time_stamp", "is_like", "is_reply"))
        for batch in self._reader.batches(self.files["interactions"], types):
            comment, item = batch.ids("comment_id"), batch.ids(key)
            batch.require(
                self._item_of_comment.lookup(comment) == item,
                "comment_id",
                f"a comment that {self.files['comments'].name} lists with the same {key}",
            )
            # Times in whole seconds are moved to the end of the second. Otherwise an interaction in the second in which
            # its visit began would come before the visit.
            time_ms = _times(batch, "time_stamp", late_ms=999)
            liked, replied = (batch.numbers(name) > 0 for name in ("is_like", "is_reply"))
            columns = {"user_id": batch.ids("user_id"), "item_id": item, "time_ms": time_ms, "comment_id": comment}
            columns["kind"] = liked + 2 * replied
            lines.add({name: column[liked | replied] for name, column in columns.items()})
        lines.flush()

    def top_comments(self, lines: Spill, interactions: Spill, builder: DatasetBuilder) -> DailyTopComments:
        """Move interactions from ``lines`` to ``interactions``, each once; return the top comments of each day.

        The builder counts the lines that repeat an earlier one.
        """
        pairs = [(np.empty(0, np.int64), np.empty(0, np.int64))]
        for partition in range(lines.partitions):
            columns = lines.pop(partition)
            _, again = find_duplicates(columns, ("user_id", "comment_id", "time_ms"), list(columns))
            columns = {name: np.delete(column, again) for name, column in columns.items()}
            builder.count_repeated_lines(len(again))
            pairs.append((columns["comment_id"], shanghai_time.local_day(columns["time_ms"])))
            interactions.add(columns)
        interacted, day = (np.concatenate(column) for column in zip(*pairs, strict=True))
        comment_id, item_id = (np.concatenate(column) for column in zip(*self._comments, strict=True))
        return DailyTopComments(comment_id, item_id, interacted, day, *self._days)

    def _column_name(self, name: str, column: str) -> str:
        """Return the name of a column in a file.

        If the file has neither name, the published one is returned, and reading the column raises the error.
        """
        other = _OTHER_NAMES.get(column, column)
        names = column_names(self.files[name])
        return other if other in names and column not in names else column


def _times(batch: ColumnBatch, name: str, late_ms: int = 0) -> np.ndarray:
    """Return times in seconds or milliseconds since 1970 as milliseconds, ``[rows] int64``.

    ``late_ms`` is added to times in seconds.
    """

    kind = batch.column(name).type
    if pa.types.is_temporal(kind) or pa.types.is_float16(kind) or pa.types.is_float32(kind):
        return batch.times(name, shanghai_time.TIMEZONE)

    def read(values: pa.Array) -> pa.Array:
        numbers = field_parsers.numbers(values).to_numpy(zero_copy_only=False)
        seconds = numbers < _SECONDS_BELOW
        milliseconds = np.where(seconds, 1_000 * numbers + late_ms, numbers)
        return times_ms(pa.array(milliseconds), "ms", shanghai_time.TIMEZONE)

    return batch.convert(name, read, "a time from 2000 to 2100, in milliseconds or seconds since 1970")


def _tag(batch: ColumnBatch) -> pa.Array:
    """Return the category of videos as a tag; missing is empty."""
    return pc.fill_null(without_markers(batch.text("category"), VALUE_NULLS), "")


def _spec(source: _KuaiComtFiles, partitions: int) -> DatasetSpec:
    """Return the content of ``dataset.json`` before the log is read."""
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
