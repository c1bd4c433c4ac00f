"""Inputs and labels of the staytime model, from a dataset with visits to comment areas.

All data is in memory: about 300 bytes per visit, a third of them for its comments. Everything fitted (ids with an own
embedding row, scale of dense features, popularity of comments) comes from training visits only.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from trainer.comment_staytime.comment_texts import StaytimeComments, check_unique, load_comments
from trainer.comment_staytime.watch_times import (
    PAST_WATCH_FEATURES,
    WatchLabels,
    past_watch_features,
    read_watch_times,
    watch_labels,
)
from trainer.config.load import parse_time
from trainer.config.staytime import InputConfig, LcuConfig, StaytimeDataConfig, WatchConfig
from trainer.console.errors import UserError
from trainer.data.format.dataset_files import DatasetFiles
from trainer.data.format.feature_join import TABLE_OF, FeatureJoin
from trainer.data.format.parquet_files import read_table
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.text_schema import read_texts

logger = logging.getLogger(__name__)

IDS = ("user_id", "item_id", "author_id")

DURATION_FEATURE = "log_video_seconds"
"""Name of the dense feature ``log(1 + seconds)`` of the video's duration; 0 if it is unknown."""

CLIP = 6.0
"""Dense features are clipped to this many standard deviations."""


@dataclass(frozen=True)
class StaytimeData:
    """Visits as columns, in order of request.

    Attributes:
        visit_id: ``[n]`` int64.
        user_id: ``[n]`` int64.
        item_id: ``[n]`` int64.
        seconds: ``[n]`` float32, length of the stay; 0 if the area was not opened.
        duration: ``[n]`` float32, duration of the video in seconds; 0 if unknown.
        fields: ``[n, fields]`` int32, rows of the packed embedding table, one column per categorical feature.
        field_names: names of the categorical features.
        rows: number of rows of the packed embedding table.
        unknown_item: column of ``fields`` with the video, and the row of unknown videos; None if the feature is
            excluded.
        dense: ``[n, n_dense]`` float32, standardised and clipped.
        dense_names: names of the dense features.
        exposures: ``[n]`` int64, number of training visits to the row's video.
        training: ``[k]`` int64, positions of the training visits.
        held_out: ``[m]`` int64, positions of the held-out visits.
        comments: comments of the visits; None without LCU.
        watch: watch times of the visits as labels; None without the task of predicting them.
    """

    visit_id: np.ndarray
    user_id: np.ndarray
    item_id: np.ndarray
    seconds: np.ndarray
    duration: np.ndarray
    fields: np.ndarray
    field_names: tuple[str, ...]
    rows: int
    unknown_item: tuple[int, int] | None
    dense: np.ndarray
    dense_names: tuple[str, ...]
    exposures: np.ndarray
    training: np.ndarray
    held_out: np.ndarray
    comments: StaytimeComments | None
    watch: WatchLabels | None


def load_staytime(
    data: StaytimeDataConfig, inputs: InputConfig, lcu: LcuConfig, seed: int, watch_config: WatchConfig
) -> StaytimeData:
    """Read the data of a job.

    Args:
        data: dataset and ranges of time.
        inputs: features of user and video.
        lcu: selection and vectors of comments.
        seed: seed of the order of a visit's comments.
        watch_config: whether the watch times of the visits are labels.

    Raises:
        UserError: a table is missing, a staytime is negative, an id of a comment, video or visit is not unique, a range
            of time is empty, no area was opened in training, a feature to exclude does not exist, or the watch times
            that the job asks for are not there.
    """
    spec = DatasetSpec.load(data.path)
    visits = _read_visits(data.path)
    request = visits.column("request_ms").to_numpy()
    left = request + visits.column("staytime_ms").to_numpy()
    training, held_out, train_until = _split(data, spec, request, left)
    seconds = (visits.column("staytime_ms").to_numpy() / 1000).astype(np.float32)
    if not (seconds[training] > 0).any():
        raise UserError(
            f"{data.path}: no comment area was opened in the training range; change data.train_from or data.train_until"
        )
    item = visits.column("item_id").to_numpy()
    author, duration, tag = _videos(data.path, item, tags=inputs.past_watch > 0)
    ids = {"user_id": visits.column("user_id").to_numpy(), "item_id": item, "author_id": author}
    side, side_names, side_rows, dense, dense_names = _features(data.path, spec, ids)
    if inputs.duration:
        dense, dense_names = np.column_stack([dense, np.log1p(duration)]), [*dense_names, DURATION_FEATURE]
    watch = None
    if inputs.past_watch or watch_config.task != "none":
        watch = read_watch_times(data.path, visits.column("visit_id").to_numpy())
    if inputs.past_watch and watch is not None:
        past = past_watch_features(
            watch,
            *(ids["user_id"], author, tag, duration, request),
            last=inputs.past_watch,
            training=training,
            until_ms=train_until,
        )
        dense, dense_names = np.column_stack([dense, past]), [*dense_names, *PAST_WATCH_FEATURES]
    _check_names((*side_names, *dense_names))
    _check_excluded(inputs.exclude, (*IDS, *side_names, *dense_names))
    columns, sizes, names = [], [], []
    for name in IDS:
        if name not in inputs.exclude:
            column, size = _id_rows(ids[name], training, inputs.min_count)
            columns.append(column)
            sizes.append(size)
            names.append(name)
    for place, name in enumerate(side_names):
        if name not in inputs.exclude:
            columns.append(side[:, place])
            sizes.append(side_rows[place])
            names.append(name)
    if not columns:
        raise UserError("input.exclude leaves no categorical feature; exclude fewer")
    kept = [place for place, name in enumerate(dense_names) if name not in inputs.exclude]
    # All categorical features share one packed table: each has its own range of rows.
    first = np.cumsum([0, *sizes])
    return StaytimeData(
        visit_id=visits.column("visit_id").to_numpy(),
        user_id=ids["user_id"],
        item_id=ids["item_id"],
        seconds=seconds,
        duration=duration,
        fields=(np.stack(columns, 1) + first[:-1]).astype(np.int32),
        field_names=tuple(names),
        rows=int(first[-1]),
        unknown_item=(at := names.index("item_id"), int(first[at])) if "item_id" in names else None,
        dense=_standardised(dense[:, kept], training),
        dense_names=tuple(dense_names[place] for place in kept),
        exposures=_exposures(ids["item_id"], training),
        training=training,
        held_out=held_out,
        comments=load_comments(data.path, visits, training, held_out, inputs.min_count, lcu, seed)
        if lcu.enabled
        else None,
        watch=None if watch is None or watch_config.task == "none" else watch_labels(watch, training, train_until),
    )


def _read_visits(path: str) -> pa.Table:
    """Read the visits in order of time; of visits with the same user, video and time only the first is kept."""
    visits = read_texts(path, "visits")
    stay = visits.column("staytime_ms").to_numpy()
    if len(stay) and stay.min() < 0:
        bad = int(np.argmin(stay))
        visit = visits.column("visit_id")[bad].as_py()
        raise UserError(f"{path}: texts/visits: visit {visit} has staytime_ms = {stay[bad]}; it must be 0 or more")
    check_unique(path, "visits", "visit_id", visits.column("visit_id").to_numpy())
    user, item, time = (visits.column(name).to_numpy() for name in ("user_id", "item_id", "request_ms"))
    order = np.lexsort((item, user, time))
    same = (np.diff(time[order]) == 0) & (np.diff(user[order]) == 0) & (np.diff(item[order]) == 0)
    kept = np.ones(len(user), bool)
    kept[order[1:][same]] = False
    if not kept.all():
        logger.info(f"{int((~kept).sum()):,} visits have the same user, video and time as another and are left out")
        visits = visits.filter(pa.array(kept))
    return visits.combine_chunks()


def _split(
    data: StaytimeDataConfig, spec: DatasetSpec, request: np.ndarray, left: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the positions of the training and of the held-out visits, and the end of training in milliseconds UTC."""

    def time_of(key: str, default: int) -> int:
        text = getattr(data, key)
        return parse_time(text, spec.timezone, f"data.{key}") if text else default

    eval_from, eval_until = time_of("eval_from", 0), time_of("eval_until", 1 << 62)
    train_from, train_until = time_of("train_from", 0), time_of("train_until", eval_from)
    if train_until > eval_from:
        raise UserError(f"data.train_until = {data.train_until!r} is after data.eval_from = {data.eval_from!r}")
    # A label is known when the area is left: a visit that reaches into the held-out range is not trained on.
    training = np.flatnonzero((request >= train_from) & (left < train_until))
    held_out = np.flatnonzero((request >= eval_from) & (request < eval_until))
    for name, rows, keys in (
        ("training", training, "data.train_from and data.train_until"),
        ("held-out", held_out, "data.eval_from and data.eval_until"),
    ):
        if not len(rows):
            raise UserError(f"{data.path}: no visit lies in the {name} range; change {keys}")
    return training, held_out, train_until


def _videos(path: str, item_id: np.ndarray, *, tags: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return author, duration in seconds and number of the tag of each visit's video, each ``[n]``.

    An unknown author is -1, an unknown duration 0, and an unknown tag -1; without ``tags`` all of them are unknown.
    """
    items = read_texts(path, "items", ["item_id", "author_id", "duration_ms", *(["tag"] if tags else [])])
    known, author, duration = (items.column(name).to_numpy() for name in ("item_id", "author_id", "duration_ms"))
    check_unique(path, "items", "item_id", known)
    tag = _numbered(items.column("tag")) if tags else np.full(len(known), -1)
    order = np.argsort(known)
    at = order[np.minimum(np.searchsorted(known, item_id, sorter=order), len(known) - 1)] if len(known) else item_id
    there = known[at] == item_id if len(known) else np.zeros(len(item_id), bool)
    if not there.any():
        return np.full(len(item_id), -1), np.zeros(len(item_id), np.float32), np.full(len(item_id), -1)
    seconds = np.where(there, duration[at] / 1000, 0).astype(np.float32)
    return np.where(there, author[at], -1), seconds, np.where(there, tag[at], -1)


def _numbered(texts: pa.ChunkedArray) -> np.ndarray:
    """Return a number for each text, the same for equal ones, and -1 for an empty one: ``[n]`` int64."""
    coded = texts.combine_chunks().dictionary_encode()
    numbers = np.array([number if text else -1 for number, text in enumerate(coded.dictionary.to_pylist())], np.int64)
    return numbers[coded.indices.to_numpy()]


def _features(
    path: str, spec: DatasetSpec, ids: dict[str, np.ndarray]
) -> tuple[np.ndarray, list[str], list[int], np.ndarray, list[str]]:
    """Return side features with names and sizes, and dense features with names, of user, author and video.

    Context features are left out.
    """
    side = tuple(feature for feature in spec.side if feature.of != "context")
    dense = tuple(feature for feature in spec.dense if feature.of != "context")
    join = FeatureJoin(replace(spec, side=side, dense=dense))
    owners = {feature.of for feature in side} | {feature.of for feature in dense}
    for owner, table in TABLE_OF.items():
        if owner in owners:
            join.add(owner, read_table(DatasetFiles(path), f"{table}.parquet"))
    join.check()
    side_values, dense_values = join.features(ids)
    return (
        side_values,
        [feature.name for feature in side],
        [feature.rows for feature in side],
        dense_values,
        [feature.name for feature in dense],
    )


def _check_excluded(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"input.exclude: no feature {name!r}; there are {', '.join(known)}")


def _check_names(names: Sequence[str]) -> None:
    for name in (DURATION_FEATURE, *PAST_WATCH_FEATURES):
        if names.count(name) > 1:
            key = "input.duration" if name == DURATION_FEATURE else "input.past_watch"
            raise UserError(f"{key} makes a feature {name!r}, but the dataset has one of that name; rename the latter")


def _id_rows(ids: np.ndarray, training: np.ndarray, min_count: int) -> tuple[np.ndarray, int]:
    """Return each id's row and the number of rows; row 0 is for ids with fewer than ``min_count`` training rows."""
    known, count = np.unique(ids[training], return_counts=True)
    known = known[count >= min_count]
    if not len(known):
        return np.zeros(len(ids), np.int64), 1
    at = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    return np.where(known[at] == ids, at + 1, 0), len(known) + 1


def _standardised(dense: np.ndarray, training: np.ndarray) -> np.ndarray:
    mean, deviation = dense[training].mean(0, dtype=np.float64), dense[training].std(0, dtype=np.float64)
    # A feature that is constant in training has deviation 0; it is only centred.
    scaled = (dense - mean) / np.where(deviation > 0, deviation, 1)
    return np.clip(scaled, -CLIP, CLIP).astype(np.float32)


def _exposures(item_id: np.ndarray, training: np.ndarray) -> np.ndarray:
    known, count = np.unique(item_id[training], return_counts=True)
    at = np.minimum(np.searchsorted(known, item_id), len(known) - 1)
    return np.where(known[at] == item_id, count[at], 0)
