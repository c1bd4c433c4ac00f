"""Importer of KuaiRand-Pure, -1K and -27K (Gao et al., CIKM 2022) as their authors publish them.

It reads ``log_standard_*``, ``user_features_*`` and ``video_features_basic_*``, and on request ``log_random_*``. The
files leave some points open; they are treated like this:

* ``time_ms`` is the only clock. ``date`` and ``hourmin`` contradict it and are not read. Days are those of
  Asia/Shanghai.
* The log repeats some (user, video, time); the first line is kept. Repetitions with equal values and with others are
  counted apart.
* Only the video file has the author of a video. The log's duration is that of the video file; 0 means missing.
* Behaviours have no times of their own. A click gets the time of the request, every other behaviour the end of the
  watch, ``time_ms + play_time_ms``. That is also the end of the visit, when its labels are known.
* ``play_time_ms`` becomes the visit's ``play_ms``. Like the stay times it is an outcome, so it is not a feature.
* ``video_features_statistic_*`` has averages over the whole month, including the future, and is not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.console.errors import UserError
from trainer.data.format.id_index import IdIndex
from trainer.data.format.schema import DOMAINS, DatasetSpec, DenseFeature, SideFeature
from trainer.data.importers import shanghai_time
from trainer.data.importers.category_codes import distinct_values, encode, vocabulary
from trainer.data.importers.columns import ColumnBatch, read_column_batches
from trainer.data.importers.id_lookup import IdLookup, first_occurrences
from trainer.data.importers.null_markers import VALUE_NULLS, NullMarkers, without_markers
from trainer.data.importers.scratch_dir import scratch_folder
from trainer.data.importers.staytime_spill import KEY, StaytimeSpill, write_staytimes
from trainer.data.writing.builder import DatasetBuilder, Progress
from trainer.data.writing.duplicates import DuplicateRule

SOURCE = (
    "{name}: C. Gao, S. Li, Y. Zhang, J. Chen, B. Li, W. Lei, P. Jiang, X. He. KuaiRand: An Unbiased Sequential "
    "Recommendation Dataset with Randomly Exposed Videos. CIKM 2022. https://kuairand.com"
)
LICENCE = "CC BY-SA 4.0"

BEHAVIOURS = {
    "click": "is_click",
    "long_view": "long_view",
    "like": "is_like",
    "profile_enter": "is_profile_enter",
    "comment": "is_comment",
    "follow": "is_follow",
    "forward": "is_forward",
    "hate": "is_hate",
}
"""Columns of the log by behaviour."""

STATISTICS = (
    ("user",),
    ("item",),
    ("author",),
    ("tab",),
    ("tag_0",),
    ("user", "tab"),
    ("item", "tab"),
    ("user", "tag_0"),
    ("hour",),
    ("duration_bucket",),
    ("user", "duration_bucket"),
    ("tab", "duration_bucket"),
)

DURATION_EDGES_S = (3, 5, 7, 10, 14, 18, 25, 35, 50, 75, 100, 150, 200, 300, 600)
"""Bounds of the duration buckets; 7 and 18 s are thresholds of the log's own rules for click and long_view."""

ASPECT_EDGES = (0.5, 0.6, 0.8, 1.2, 1.5, 2.0)
"""Bounds of the buckets of width over height."""

_USER_CATEGORIES = {
    "user_active_degree": pa.string(),
    "is_lowactive_period": pa.float64(),
    "is_live_streamer": pa.float64(),
    "is_video_author": pa.float64(),
    "follow_user_num_range": pa.string(),
    "fans_user_num_range": pa.string(),
    "friend_user_num_range": pa.string(),
    "register_days_range": pa.string(),
    # some columns of encrypted features contain 1, others 1.0
    **{f"onehot_feat{number}": pa.float64() for number in range(18)},
}
_USER_COUNTS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
_VIDEO_CATEGORIES = {
    "video_type": pa.string(),
    "upload_type": pa.string(),
    "visible_status": pa.float64(),
    "music_type": pa.float64(),
}
_VIDEO_MEASURES = ("video_duration", "server_width", "server_height")
_NULLS = NullMarkers((*VALUE_NULLS, "-124"))
_UNIQUE_ID = "an id that occurs only once"
_TABS = 15
_ITEMS_AT_ONCE = 1_000_000


def import_kuairand(
    src: str | Path, out: str | Path, partitions: int = 16, *, random: bool = False, progress: Progress | None = None
) -> DatasetSpec:
    """Build a dataset from a folder of KuaiRand.

    Args:
        src: the unpacked folder, or the ``data`` folder in it; file names give the version.
        out: the dataset to make; must not exist.
        partitions: number of partitions; the largest one must fit in memory.
        random: True to read ``log_random_*``, too; a context feature ``is_rand`` then marks its rows.
        progress: callback that gets the name of a phase, the work done and the total work.

    Returns:
        The description of the dataset.

    The logs are read in blocks. The videos stay in memory: 16 bytes each here, up to 48 for the check that each id
    comes once, and the rest in the builder. We measured 195 bytes per video without that check, so the 32 million
    videos of 27K take 7 to 8 GB, beside the largest partition.

    Raises:
        UserError: a file or column is missing, a value is bad, or a video has no author.
    """
    files = find_files(Path(src), random)
    report = progress or (lambda what, done, total: None)
    report("reading videos", 0, 1)
    vocabularies = _user_vocabularies(files.users) | _video_vocabularies(files.videos)
    spec = _spec(files, vocabularies, partitions)
    with DatasetBuilder(out, spec, duplicates=DuplicateRule()) as builder:
        for table in _users(files.users, vocabularies):
            builder.table("users", table)
        authors = IdLookup(missing=-1)
        for items, texts in _items(files.videos, vocabularies):
            builder.table("items", items)
            builder.texts("items", texts)
            authors.add(items.column("item_id").to_numpy(), items.column("author_id").to_numpy())
        rows, read, total = 0, 0, sum(log.stat().st_size for log in files.logs)
        with scratch_folder(out) as folder:
            staytimes = StaytimeSpill(folder / "stays", partitions)
            for log in files.logs:
                report("reading logs", read, total)
                for visits, staytime_ms in _visits(log, rows, _VideoAuthors(files.videos, authors), random):
                    rows += visits.num_rows
                    builder.visits(visits)
                    keys = {name: visits.column(name).to_numpy() for name in ("visit_id", *KEY)}
                    staytimes.add({**keys, "staytime_ms": staytime_ms})
                read += log.stat().st_size
            report("reading logs", total, total)
            write_staytimes(builder, staytimes)
        return builder.finish(progress, {"log_rows": rows})


@dataclass(frozen=True)
class KuaiRandFiles:
    """Files of one version of KuaiRand; ``logs`` are in reading order."""

    version: str
    users: Path
    videos: Path
    logs: tuple[Path, ...]


def find_files(src: Path, random: bool = False) -> KuaiRandFiles:
    """Return the files in ``src`` or ``src/data``.

    Raises:
        UserError: the folder, the logs or another file is missing, or there is more than one version.
    """
    if not src.is_dir():
        raise UserError(f"{src}: no such folder; unpack KuaiRand-{{Pure,1K,27K}}.tar.gz and give its folder")
    folder = next((folder for folder in (src, src / "data") if any(folder.glob("log_standard_*.csv"))), None)
    if folder is None:
        raise UserError(f"{src}: no log_standard_*.csv here or in data/; give the folder of KuaiRand-Pure, -1K or -27K")
    logs = sorted(folder.glob("log_standard_*.csv"))
    versions = {match[1] for log in logs if (match := re.search(r"_(pure|1k|27k)(_part\d+)?\.csv$", log.name))}
    if len(versions) != 1:
        raise UserError(f"{folder}: expected the logs of one version (_pure, _1k or _27k), found {sorted(versions)}")
    version = versions.pop()
    if random:
        found = sorted(folder.glob(f"log_random_*_{version}.csv"))
        if not found:
            raise UserError(f"{folder}: log_random_*_{version}.csv is missing")
        logs += found
    files = KuaiRandFiles(
        version,
        users=folder / f"user_features_{version}.csv",
        videos=folder / f"video_features_basic_{version}.csv",
        logs=tuple(logs),
    )
    for file in (files.users, files.videos):
        if not file.is_file():
            raise UserError(f"{file}: is missing; it is one of the files of KuaiRand")
    return files


def _spec(files: KuaiRandFiles, vocabularies: dict[str, tuple[str, ...]], partitions: int) -> DatasetSpec:
    """Return the content of ``dataset.json`` before the logs are read."""
    name = f"KuaiRand-{'Pure' if files.version == 'pure' else files.version.upper()}"
    context = [SideFeature("tab", "context", _TABS + 1), SideFeature("hour", "context", 25)]
    context.append(SideFeature("weekday", "context", 8))
    random = any(log.name.startswith("log_random") for log in files.logs)
    if random:
        context.append(SideFeature("is_rand", "context", 3))
    sizes = {feature: len(values) + 1 for feature, values in vocabularies.items()}
    return DatasetSpec(
        name=name,
        source=SOURCE.format(name=name),
        licence=LICENCE,
        partitions=partitions,
        timezone=shanghai_time.TIMEZONE,
        behaviours=tuple(BEHAVIOURS),
        applies={behaviour: ("video",) for behaviour in BEHAVIOURS},
        candidates=("video",),
        side=(
            *(SideFeature(feature, "user", sizes[feature]) for feature in _USER_CATEGORIES),
            *(SideFeature(feature, "item", sizes[feature]) for feature in _VIDEO_CATEGORIES),
            SideFeature("tag_0", "item", sizes["tag"]),
            SideFeature("tag_1", "item", sizes["tag"]),
            SideFeature("duration_bucket", "item", len(DURATION_EDGES_S) + 2),
            SideFeature("aspect_bucket", "item", len(ASPECT_EDGES) + 2),
            *context,
        ),
        dense=(
            DenseFeature("log_duration", "item"),
            *(DenseFeature(f"log_{count}", "user") for count in _USER_COUNTS),
            DenseFeature("day_sin", "context"),
            DenseFeature("day_cos", "context"),
        ),
        statistics=STATISTICS,
        tag="tag_0",
        extra={
            "files": [file.name for file in (files.users, files.videos, *files.logs)],
            "vocabularies": {feature: list(values) for feature, values in vocabularies.items()},
            "codes": "0 is unknown; 1 + position in `vocabularies` (tag_0 and tag_1: those of `tag`); tab, hour and "
            "is_rand + 1; weekday 1 (Monday) to 7; buckets 1 + number of edges that are not above the value",
            "duration_edges_s": list(DURATION_EDGES_S),
            "aspect_edges": list(ASPECT_EDGES),
        },
    )


def _user_vocabularies(file: Path) -> dict[str, tuple[str, ...]]:
    """Return the values of the users' categories, by feature."""
    values: dict[str, set[str]] = {feature: set() for feature in _USER_CATEGORIES}
    for batch in read_column_batches(file, _USER_CATEGORIES, nulls=_NULLS):
        for feature, found in values.items():
            found |= batch.categories(feature)
    return {feature: vocabulary(found) for feature, found in values.items()}


def _users(file: Path, vocabularies: dict[str, tuple[str, ...]]) -> Iterator[pa.Table]:
    """Yield the table of users, batch by batch."""
    types = {"user_id": pa.int64(), **_USER_CATEGORIES, **dict.fromkeys(_USER_COUNTS, pa.float64())}
    known = IdIndex()
    for batch in read_column_batches(file, types, nulls=_NULLS):
        columns = {"user_id": batch.ids("user_id")}
        batch.require(first_occurrences(known, columns["user_id"]), "user_id", _UNIQUE_ID)
        columns |= {feature: batch.codes(feature, vocabularies[feature]) for feature in _USER_CATEGORIES}
        columns |= {f"log_{count}": _log_count(batch.numbers(count)) for count in _USER_COUNTS}
        yield pa.table(columns)


def _video_vocabularies(file: Path) -> dict[str, tuple[str, ...]]:
    """Return the values of the videos' categories, by feature."""
    values: dict[str, set[str]] = {feature: set() for feature in (*_VIDEO_CATEGORIES, "tag")}
    for batch in read_column_batches(file, {**_VIDEO_CATEGORIES, "tag": pa.string()}, nulls=_NULLS):
        for feature in _VIDEO_CATEGORIES:
            values[feature] |= batch.categories(feature)
        values["tag"] |= distinct_values(_two_tags(batch.column("tag")), _NULLS.values)
    return {feature: vocabulary(found) for feature, found in values.items()}


def _items(file: Path, vocabularies: dict[str, tuple[str, ...]]) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Yield the ``items`` table and the text table of about a million videos at a time.

    The text table has durations and tags only, because KuaiRand has no texts.
    """
    types = {"video_id": pa.int64(), "author_id": pa.int64(), **_VIDEO_CATEGORIES, "tag": pa.string()}
    types |= dict.fromkeys(_VIDEO_MEASURES, pa.float64())
    parts: list[pa.Table] = []
    text_parts: list[pa.Table] = []
    known = IdIndex()
    for batch in read_column_batches(file, types, nulls=_NULLS):
        duration, width, height = (batch.numbers(measure) for measure in _VIDEO_MEASURES)
        columns = {"item_id": batch.ids("video_id")}
        batch.require(first_occurrences(known, columns["item_id"]), "video_id", _UNIQUE_ID)
        for row in np.flatnonzero(batch.column("author_id").is_null().to_numpy(zero_copy_only=False))[:1].tolist():
            batch.raise_bad_value("author_id", row, f"the author of video {columns['item_id'][row]}")
        columns["author_id"] = batch.ids("author_id")
        columns["domain"] = np.full(batch.rows, DOMAINS.index("video"), np.int8)
        columns |= {feature: batch.codes(feature, vocabularies[feature]) for feature in _VIDEO_CATEGORIES}
        for number, tag in enumerate(_two_tags(batch.column("tag"))):
            columns[f"tag_{number}"] = encode(tag, vocabularies["tag"])
        columns["duration_bucket"] = _bucket(duration / 1000, DURATION_EDGES_S)
        columns["aspect_bucket"] = _bucket(
            np.divide(width, height, out=np.zeros_like(width), where=height > 0), ASPECT_EDGES
        )
        columns["log_duration"] = _log_count(duration / 1000)
        parts.append(pa.table(columns))
        keys = {name: columns[name] for name in ("item_id", "author_id", "domain")}
        first_tag = pc.fill_null(without_markers(_two_tags(batch.column("tag"))[0], _NULLS.values), "")
        batch.require(duration <= np.iinfo(np.int32).max, "video_duration", "milliseconds, at most 2^31 - 1")
        milliseconds = np.maximum(duration, 0).astype(np.int64)
        texts = {"duration_ms": milliseconds, "tag": first_tag, "text": np.full(batch.rows, "")}
        text_parts.append(pa.table(keys | texts))
        if sum(part.num_rows for part in parts) >= _ITEMS_AT_ONCE:
            yield pa.concat_tables(parts), pa.concat_tables(text_parts)
            parts, text_parts = [], []
    if parts:
        yield pa.concat_tables(parts), pa.concat_tables(text_parts)


def _visits(log: Path, first_row: int, authors: _VideoAuthors, random: bool) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """Yield the visits of a log, block by block, with the milliseconds spent in the comments of each visit.

    ``visit_id`` is the number of the line, counted over all logs.
    """
    names = (
        "user_id",
        "video_id",
        "time_ms",
        "play_time_ms",
        "comment_stay_time",
        "tab",
        *BEHAVIOURS.values(),
        *(["is_rand"] * random),
    )
    for batch in read_column_batches(log, dict.fromkeys(names, pa.int64())):
        for name in names:
            present = batch.column(name).is_valid().to_numpy(zero_copy_only=False)
            batch.require(present, name, "a whole number")
        column = {name: batch.column(name).to_numpy() for name in names}
        column |= {name: batch.ids(name) for name in ("user_id", "video_id")}
        time_ms = batch.times("time_ms", shanghai_time.TIMEZONE)
        batch.require(column["play_time_ms"] < 1 << 31, "play_time_ms", "milliseconds, at most 2^31 - 1")
        play_ms = np.maximum(column["play_time_ms"], 0)
        first = first_row + batch.first_row - 1
        tab = column["tab"]
        visits = {
            "visit_id": np.arange(first, first + batch.rows),
            "user_id": column["user_id"],
            "author_id": authors.lookup(column["video_id"], batch),
            "item_id": column["video_id"],
            "domain": np.full(batch.rows, DOMAINS.index("video"), np.int8),
            "request_ms": time_ms,
            "exit_ms": time_ms + play_ms,
            "play_ms": play_ms,
        }
        for behaviour, name in BEHAVIOURS.items():
            happens = 0 if behaviour == "click" else play_ms
            visits[f"delay_{behaviour}"] = np.where(column[name] > 0, happens, -1).astype(np.int32)
        visits["tab"] = np.where((tab >= 0) & (tab < _TABS), tab + 1, 0).astype(np.int32)
        visits["hour"] = shanghai_time.hour_code(time_ms)
        visits["weekday"] = shanghai_time.weekday_code(time_ms)
        # unlike the code of the hour, these are continuous at midnight
        angle = 2 * np.pi * (shanghai_time.local_ms(time_ms) % shanghai_time.DAY_MS / shanghai_time.DAY_MS)
        visits["day_sin"] = np.sin(angle).astype(np.float32)
        visits["day_cos"] = np.cos(angle).astype(np.float32)
        if random:
            visits["is_rand"] = (column["is_rand"] > 0).astype(np.int32) + 1
        staytime_ms = column["comment_stay_time"]
        batch.require(staytime_ms >= 0, "comment_stay_time", "milliseconds, 0 or more")
        yield pa.table(visits), staytime_ms


class _VideoAuthors:
    """Lookup of the author of each video; an unknown video is an error."""

    def __init__(self, file: Path, authors: IdLookup) -> None:
        self._file = file
        self._authors = authors

    def lookup(self, video_id: np.ndarray, batch: ColumnBatch) -> np.ndarray:
        """Return the authors of ``video_id [n]``, the videos of a batch of a log, ``[n] int64``.

        Raises:
            UserError: a video is not in the video file.
        """
        author_id = self._authors.lookup(video_id)
        batch.require(author_id >= 0, "video_id", f"a video that is in {self._file}, which has the authors")
        return author_id


def _two_tags(tags: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Return the first and the second of comma-separated tags, null where there are fewer."""
    lists = pc.split_pattern(pc.fill_null(tags, ""), ",")
    both = pc.list_slice(lists, 0, 2, return_fixed_size_list=True).flatten()
    return both[0::2], both[1::2]


def _log_count(values: np.ndarray) -> np.ndarray:
    """Return ``log(1 + value)`` as float32; negative values count as 0."""
    return np.log1p(np.maximum(values, 0)).astype(np.float32)


def _bucket(values: np.ndarray, edges: tuple[float, ...]) -> np.ndarray:
    """Return 1 + the number of edges not above the value; 0 where the value is 0, which means missing."""
    return np.where(values > 0, np.searchsorted(edges, values, side="right") + 1, 0).astype(np.int32)
