"""Metrics of the held-out rows that a run has kept, with intervals over users, for all rows and for parts of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.console.errors import UserError, one_line
from trainer.metrics.user_bootstrap import ResampledMetric, draw_users, interval, resample_auc, resample_gauc
from trainer.ranking.held_out_rows import COUNTED, HELD_OUT, IDS, TIME_ZONE, USER_HASHES, USERS_BELOW
from trainer.report.charts import Point, Series
from trainer.runtime.stored_files import open_regular

DRAWS = 200
"""Draws of users of an interval."""

PART_DRAWS = 100
"""Draws of users of an interval of a part of the rows."""

SHOWN = 4
"""Behaviours that a chart of parts shows: those with the most positives."""

FEWEST = 10
"""Fewest positives and negatives of a part that has an AUC in a chart."""

Resample = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], ResampledMetric]
"""Function of the users of rows, the draws, scores and labels: trainer/metrics/user_bootstrap.py."""

_EDGES = (1, 10, 100, 1000, 10_000)
_BANDS = ("0", "1–9", "10–99", "100–999", "1,000–9,999", "10,000+")
_MINUTE_MS = 60_000
_QUARTER_MINUTES = 15


@dataclass(frozen=True)
class HeldOutRows:
    """Rows of ``held_out.parquet``; trainer/ranking/held_out_rows.py describes the columns.

    Attributes:
        behaviours: names of the K behaviours.
        user_id, visit_id, request_ms: ``[n]`` int64.
        probability, label, mask: ``[n, K]``.
        truth: ``[n, K]``; None if it is not known.
        ids: ``item_id`` and ``author_id`` -> ``[n]`` int64, -1 where it is not known, as far as they are stored.
        earlier: ``user`` and ``author`` -> number of their earlier rows, ``[n]`` float32, as far as it is stored.
        timezone: of the dataset.
        sampled: True if the run has not kept all of its users.
    """

    behaviours: tuple[str, ...]
    user_id: np.ndarray
    visit_id: np.ndarray
    request_ms: np.ndarray
    probability: np.ndarray
    label: np.ndarray
    mask: np.ndarray
    truth: np.ndarray | None
    ids: dict[str, np.ndarray]
    earlier: dict[str, np.ndarray]
    timezone: str
    sampled: bool

    @staticmethod
    def read(directory: Path) -> HeldOutRows:
        """Read the rows that a model has kept.

        Raises:
            FileNotFoundError: there are none.
            UserError: the file cannot be read, is damaged, or is that of another kind of run.
        """
        file = directory / HELD_OUT
        try:
            with open_regular(file) as opened:
                table = pq.read_table(opened)
            notes = table.schema.metadata or {}
            behaviours = tuple(name[2:] for name in table.column_names if name.startswith("p_"))
            if not behaviours:
                raise UserError(f"{file}: has no predictions of behaviours; a ranker writes them")

            def matrix(prefix: str, kind: type) -> np.ndarray:
                columns = [table[f"{prefix}_{name}"].to_numpy().astype(kind) for name in behaviours]
                return np.stack(columns, 1) if len(table) else np.zeros((0, len(behaviours)), kind)

            known = f"truth_{behaviours[0]}" in table.column_names
            return HeldOutRows(
                behaviours,
                user_id=table["user_id"].to_numpy().astype(np.int64),
                visit_id=table["visit_id"].to_numpy().astype(np.int64),
                request_ms=table["request_ms"].to_numpy().astype(np.int64),
                probability=matrix("p", np.float32),
                label=matrix("label", np.uint8),
                mask=matrix("mask", np.uint8),
                truth=matrix("truth", np.float32) if known else None,
                ids={name: table[name].to_numpy().astype(np.int64) for name in IDS if name in table.column_names},
                earlier={
                    key: table[f"earlier_{key}"].to_numpy().astype(np.float32)
                    for key in COUNTED
                    if f"earlier_{key}" in table.column_names
                },
                timezone=notes.get(TIME_ZONE, b"UTC").decode(errors="replace"),
                sampled=int(notes.get(USERS_BELOW, b"0")) < USER_HASHES,
            )
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{file}: damaged, or not written by this version ({one_line(error):.120})") from None

    def take(self, rows: np.ndarray) -> HeldOutRows:
        """Return some of the rows, by their places."""
        return HeldOutRows(
            self.behaviours,
            self.user_id[rows],
            self.visit_id[rows],
            self.request_ms[rows],
            self.probability[rows],
            self.label[rows],
            self.mask[rows],
            None if self.truth is None else self.truth[rows],
            {name: values[rows] for name, values in self.ids.items()},
            {key: values[rows] for key, values in self.earlier.items()},
            self.timezone,
            self.sampled,
        )

    def hours(self) -> np.ndarray:
        """Return the hour of each request in the dataset's time zone, ``[n]`` int64."""
        try:
            zone = ZoneInfo(self.timezone)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            zone = ZoneInfo("UTC")
        # Offsets of time zones change at quarters of an hour.
        quarter = self.request_ms // (_QUARTER_MINUTES * _MINUTE_MS)
        values, place = np.unique(quarter, return_inverse=True)
        seconds = values * _QUARTER_MINUTES * 60
        hours = np.array([datetime.fromtimestamp(second, zone).hour for second in seconds.tolist()], np.int64)
        return hours[place]


@dataclass(frozen=True)
class Parts:
    """AUC of the parts of the rows, such as the hours of the day.

    Attributes:
        title: meaning of the parts.
        names: of the parts.
        rows: number of rows of each part.
        series: AUC by part, for each behaviour.
    """

    title: str
    names: list[str]
    rows: list[int]
    series: list[Series]


class UserDraws:
    """Draws of the users of some rows.

    Args:
        held_out: the rows.
        draws: number of draws.
    """

    def __init__(self, held_out: HeldOutRows, draws: int) -> None:
        self._rows = held_out
        self._index, self._counts = draw_users(held_out.user_id, draws, seed=1)
        self._draws = draws

    def auc(self, k: int, scores: np.ndarray, rows: np.ndarray | None = None) -> ResampledMetric:
        """Return the AUC of ``scores [n]`` for behaviour ``k``, of all rows or of those at some places."""
        return self._resampled(resample_auc, k, scores, rows)

    def gauc(self, k: int, scores: np.ndarray) -> ResampledMetric:
        """Return the GAUC of ``scores [n]`` for behaviour ``k``."""
        return self._resampled(resample_gauc, k, scores, None)

    def _resampled(self, resample: Resample, k: int, scores: np.ndarray, rows: np.ndarray | None) -> ResampledMetric:
        kept = self._rows.mask[:, k] > 0
        places = np.flatnonzero(kept) if rows is None else rows[kept[rows]]
        labels = self._rows.label[places, k]
        if not labels.any() or labels.all():
            return ResampledMetric(float("nan"), np.full(self._draws, np.nan))
        return resample(self._index[places], self._counts, scores[places], labels)


def point_of(metric: ResampledMetric, value: float | None = None) -> Point | None:
    """Return a metric with its interval; None if it is undefined.

    Args:
        metric: of the rows that are kept.
        value: of all rows, in place of that of the rows that are kept.
    """
    if not np.isfinite(metric.value):
        return None
    low, high = interval(metric.draws)
    known = np.isfinite(low) and np.isfinite(high)
    return Point(metric.value if value is None else value, *((low, high) if known else (None, None)))


def metrics_with_intervals(held_out: HeldOutRows) -> dict[str, dict[str, Point | None]]:
    """Return behaviour -> ``auc``, ``gauc``, and ``best_auc`` if the true probabilities are known."""
    draws = UserDraws(held_out, DRAWS)
    found: dict[str, dict[str, Point | None]] = {}
    for k, behaviour in enumerate(held_out.behaviours):
        scores = held_out.probability[:, k]
        found[behaviour] = {"auc": point_of(draws.auc(k, scores)), "gauc": point_of(draws.gauc(k, scores))}
        if held_out.truth is not None:
            found[behaviour]["best_auc"] = point_of(draws.auc(k, held_out.truth[:, k]))
    return found


def parts_of(held_out: HeldOutRows) -> list[Parts]:
    """Return the AUC by activity of the user, popularity of the author and hour, as far as they are stored."""
    titles = {
        "user": "AUC by activity: earlier rows of the user",
        "author": "AUC by popularity: earlier rows of the author (0: new)",
    }
    dimensions: list[tuple[str, np.ndarray, Sequence[str]]] = [
        (titles[key], np.searchsorted(_EDGES, np.nan_to_num(counts), side="right"), _BANDS)
        for key, counts in held_out.earlier.items()
    ]
    hours = f"AUC by hour of the request ({held_out.timezone})", held_out.hours(), tuple(map(str, range(24)))
    draws = UserDraws(held_out, PART_DRAWS)
    # Intervals of several behaviours in 24 hours would hide each other.
    return [
        *(_parts(held_out, draws, SHOWN, *dimension) for dimension in dimensions),
        _parts(held_out, draws, 1, *hours),
    ]


def _parts(
    held_out: HeldOutRows, draws: UserDraws, most: int, title: str, part: np.ndarray, names: Sequence[str]
) -> Parts:
    """Return the AUC of the ``most`` behaviours with the most positives, by part of the rows."""
    present = np.unique(part).tolist()
    rows = [np.flatnonzero(part == number) for number in present]
    positives = (held_out.label * (held_out.mask > 0)).sum(0)
    shown = sorted(np.argsort(-positives, kind="stable")[:most].tolist())
    series = []
    for k in shown:
        points = []
        for places in rows:
            labels = held_out.label[places, k][held_out.mask[places, k] > 0] > 0
            enough = min(labels.sum(), (~labels).sum()) >= FEWEST
            points.append(point_of(draws.auc(k, held_out.probability[:, k], places)) if enough else None)
        series.append(Series(held_out.behaviours[k], list(range(len(present))), points))
    if len(series) == 1:
        title = f"{title}, {series[0].name}"
    return Parts(title, [names[number] for number in present], [len(places) for places in rows], series)
