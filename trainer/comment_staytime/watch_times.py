"""Watch times of visits: what earlier ones say at a request, and this visit's own as a label.

The watch time of a visit is known from its end on. So a visit may be described by the watch times of visits that ended
before its request, and never by its own, which is a label like the stay in the comment area: a model can be trained to
predict it, and use the prediction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.comment_staytime.earlier_events import earlier_events
from trainer.console.errors import UserError
from trainer.data.format.dataset_files import DatasetFiles
from trainer.data.format.parquet_files import read_table
from trainer.data.format.schema import DatasetSpec

PAST_WATCH_FEATURES = (
    "past_watch",
    "past_watch_share",
    "past_watch_visits",
    "last_watch",
    "author_past_watch",
    "author_past_visits",
    "tag_past_watch",
    "tag_past_visits",
)
"""Names of the dense features of earlier watch times.

``past_watch`` is the mean of ``log(1 + seconds)`` over the user's latest visits, ``past_watch_share`` that of the
watched share of the video, ``past_watch_visits`` the logarithm of one plus their number, and ``last_watch`` the latest
one. ``author_`` and ``tag_`` are the same over the user's latest visits to videos of this author and of this tag."""

UNIT = 1 << 32
"""Integer that stands for 1 in sums over visits.

Integers are added without rounding, so a sum depends on its own visits only. A multiple of 2^-32 is closer to a value
than float32 is, if the value is above 0.002. Sums of 2^26 visits fit, as long as no logarithm of seconds reaches 32."""

MOST_LOOPS = 3.0
"""Largest watched share of a video: a video that is looped for minutes says no more than three loops do."""


@dataclass(frozen=True)
class WatchTimes:
    """Watch times of n visits, in the order of the visits.

    Attributes:
        seconds: ``[n]`` float64, seconds watched; 0 where they are not known.
        known_ms: ``[n]`` int64, end of the visit, from which its watch time is known.
        known: ``[n]`` bool, True if the log has the end of the visit.
    """

    seconds: np.ndarray
    known_ms: np.ndarray
    known: np.ndarray

    @property
    def log_seconds(self) -> np.ndarray:
        """Logarithm of one plus the seconds, ``[n]`` float64."""
        return np.log1p(self.seconds)


class WatchLabels(NamedTuple):
    """This visit's own watch time as a label.

    Attributes:
        target: ``[n]`` float32, ``log(1 + seconds)`` in standard deviations from its mean in training; NaN where it is
            not known, and for training visits that ended after the end of training.
        mean: mean of ``log(1 + seconds)`` in training.
        scale: its standard deviation in training.
    """

    target: np.ndarray
    mean: float
    scale: float


def read_watch_times(path: str, visit_id: np.ndarray) -> WatchTimes:
    """Read the watch times of visits from the dataset's events.

    Args:
        path: dataset, a directory or an fsspec URL.
        visit_id: ``[n]`` int64, unique.

    Raises:
        UserError: a file of events is missing or damaged, or no visit's end is in the events.
    """
    files, order = DatasetFiles(path), np.argsort(visit_id)
    ids = visit_id[order]
    found = WatchTimes(np.zeros(len(ids)), np.zeros(len(ids), np.int64), np.zeros(len(ids), bool))
    for partition in range(DatasetSpec.load(path).partitions):
        name = f"events/part-{partition:05d}.parquet"
        try:
            events = read_table(files, name, ["visit_id", "event", "time_ms", "value"])
        except FileNotFoundError:
            raise UserError(f"{path}: has no {name}, which has the watch times") from None
        ends = events.filter(pc.equal(events["event"].cast(pa.string()), "exit"))
        visit, time_ms, value = (ends[column].to_numpy() for column in ("visit_id", "time_ms", "value"))
        at = np.minimum(np.searchsorted(ids, visit), max(len(ids) - 1, 0))
        ours = np.flatnonzero(ids[at] == visit) if len(ids) else np.empty(0, np.int64)
        rows = order[at[ours]]
        found.seconds[rows], found.known_ms[rows], found.known[rows] = value[ours] / 1000, time_ms[ours], True
    if not found.known.any():
        raise UserError(
            f"{path}: the events have no end of any visit of texts/visits, so there are no watch times; set "
            "input.past_watch = 0 and watch.task = 'none'"
        )
    return found


def watch_labels(watch: WatchTimes, training: np.ndarray, until_ms: int) -> WatchLabels:
    """Return the labels of all visits, fitted on the training visits that ended before the end of training.

    Args:
        watch: watch times of the visits.
        training: positions of the training visits.
        until_ms: end of training.

    Raises:
        UserError: no training visit has a watch time.
    """
    fitted = _fitted(watch, training, until_ms)
    target = np.where(watch.known, watch.log_seconds, np.nan)
    target[training[watch.known_ms[training] >= until_ms]] = np.nan
    mean, scale = float(target[fitted].mean()), float(target[fitted].std()) or 1.0
    return WatchLabels(((target - mean) / scale).astype(np.float32), mean, scale)


def past_watch_features(
    watch: WatchTimes,
    user: np.ndarray,
    author: np.ndarray,
    tag: np.ndarray,
    duration: np.ndarray,
    request_ms: np.ndarray,
    *,
    last: int,
    training: np.ndarray,
    until_ms: int,
) -> np.ndarray:
    """Describe each visit by the watch times of the user's visits that ended before its request.

    A mean is drawn to its prior with the weight of one visit, so that it is defined without visits: the prior of the
    user's means is the mean of training, that of the means by author and tag is the user's own.

    Args:
        watch: watch times of the visits.
        user: ``[n]`` int64, of the visits, as are the following.
        author: int64; -1 is unknown, and has no visits.
        tag: int64; -1 is unknown, and has no visits.
        duration: float, seconds of the video; 0 if unknown, then the visit has no watched share.
        request_ms: int64.
        last: number of latest visits that count.
        training: positions of the training visits.
        until_ms: end of training.

    Returns:
        ``[n, features]`` float32, see ``PAST_WATCH_FEATURES``.

    Raises:
        UserError: no training visit has a watch time.
    """
    share = np.minimum(watch.seconds / np.where(duration > 0, duration, 1), MOST_LOOPS)
    ended = np.flatnonzero(watch.known)
    values = np.stack([np.ones(len(user)), watch.log_seconds, duration > 0, np.where(duration > 0, share, 0)], 1)
    units = np.rint(values * UNIT).astype(np.int64)
    fitted = values[_fitted(watch, training, until_ms)]
    prior = fitted[:, 1].mean()
    prior_share = fitted[:, 3].sum() / max(fitted[:, 2].sum(), 1)

    def sums(groups: tuple[np.ndarray, ...], there: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        order, first, stop = earlier_events(groups, ended, watch.known_ms[ended], request_ms)
        # The total over all users may wrap around; the difference of two totals is exact all the same.
        total = np.concatenate([np.zeros((1, units.shape[1]), np.int64), np.cumsum(units[ended[order]], 0)])
        of_visit: np.ndarray = (total[stop] - total[np.maximum(first, stop - last)]) / UNIT
        latest = np.full(len(user), prior)
        latest[stop > first] = watch.log_seconds[ended[order[stop[stop > first] - 1]]]
        return of_visit if there is None else of_visit * there[:, None], latest

    of_user, latest = sums((user,))
    count, logs, shared, shares = of_user.T
    mean = (logs + prior) / (count + 1)
    columns = [mean, (shares + prior_share) / (shared + 1), np.log1p(count), latest]
    for group in (author, tag):
        count, logs = sums((user, group), group >= 0)[0].T[:2]
        columns += [(logs + mean) / (count + 1), np.log1p(count)]
    return np.stack(columns, 1).astype(np.float32)


def _fitted(watch: WatchTimes, training: np.ndarray, until_ms: int) -> np.ndarray:
    """Return the training visits whose watch time is known before the end of training."""
    fitted = training[watch.known[training] & (watch.known_ms[training] < until_ms)]
    if not len(fitted):
        raise UserError("no training visit ended before the end of training, so no watch time can be learnt")
    return fitted
