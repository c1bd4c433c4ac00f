"""Store of the data of visits that rows need beside labels: logged features, watch time and arrival times.

Labels come from the assemblers, which only see behaviours. The store keeps the other data from the event that carries
it until the visit can give no more rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from trainer.data.format.schema import DatasetSpec, Rows, row_columns
from trainer.data.format.validation import Columns
from trainer.stream.labels.assembled_rows import EXIT, FIRST_BEHAVIOUR
from trainer.stream.sources.logged_features import FEATURES
from trainer.stream.sources.source import PartitionEvents

NEVER = -1

_Visit = tuple[int, int]
"""``user_id, visit_id``."""


class VisitFeatureStore:
    """Features, watch times and arrival times of the visits of a partition, by ``(user_id, visit_id)``.

    Args:
        spec: description of the dataset, or of the data in the stream.
        keep_arrivals: keep the arrival times of behaviours; costs memory and time, and helps only in a live stream.
    """

    def __init__(self, spec: DatasetSpec, keep_arrivals: bool) -> None:
        columns = row_columns(spec)
        self._empty = {name: np.zeros(columns[name][1], columns[name][0]) for name in FEATURES}
        self._keep_arrivals = keep_arrivals
        # A visit id may come back with another request after the visit has ended, so the time is part of the key.
        self._features: dict[_Visit, dict[int, tuple[np.ndarray, ...]]] = {}
        self._watched: dict[_Visit, dict[int, float]] = {}
        self._arrived: dict[_Visit, dict[int, int]] = {}

    def add(self, part: PartitionEvents) -> None:
        """Store the data of events, in order of arrival."""
        events, logged = part.events, part.logged
        at = logged.at.tolist()
        features = zip(logged.side, logged.dense, logged.stat, strict=True)
        for key, time_ms, values in zip(
            _visits(events, logged.at), events["time_ms"][at].tolist(), features, strict=True
        ):
            # For a duplicate request the first copy counts, as for any event.
            self._features.setdefault(key, {}).setdefault(time_ms, values)
        exits = np.flatnonzero(events["event"] == EXIT)
        ended = zip(
            _visits(events, exits), events["time_ms"][exits].tolist(), events["value"][exits].tolist(), strict=True
        )
        for key, time_ms, value in ended:
            self._watched.setdefault(key, {}).setdefault(time_ms, value)
        if self._keep_arrivals:
            happened = np.flatnonzero(events["event"] >= FIRST_BEHAVIOUR)
            behaviour = (events["event"][happened] - FIRST_BEHAVIOUR).tolist()
            for key, k, ms in zip(
                _visits(events, happened), behaviour, part.arrived_ms[happened].tolist(), strict=True
            ):
                self._arrived.setdefault(key, {}).setdefault(k, ms)

    def features(self, rows: Rows) -> tuple[Rows, int]:
        """Return the logged features of rows (``FEATURES``), and the number of rows without: those have zeros.

        Args:
            rows: ``user_id``, ``visit_id`` and ``request_ms``.
        """
        found = [
            self._features.get(key, {}).get(request_ms)
            for key, request_ms in zip(_visits(rows), rows["request_ms"].tolist(), strict=True)
        ]
        out = {name: np.zeros((len(found), *empty.shape), empty.dtype) for name, empty in self._empty.items()}
        # ``np.stack`` needs at least one row.
        there = [place for place, values in enumerate(found) if values is not None]
        for column, name in enumerate(FEATURES):
            if there:
                out[name][there] = np.stack([values[column] for values in found if values is not None])
        return out, len(found) - len(there)

    def watched_ms(self, rows: Rows, idle_ms: int) -> np.ndarray:
        """Return the watch time of ended visits, ``[n]`` int64 milliseconds.

        It is the value of the exit event; without an exit it is the time from the request to the last event.

        Args:
            rows: rows of kind ``full``: ``user_id``, ``visit_id``, ``request_ms`` and ``emit_ms``.
            idle_ms: idle timeout of a visit without an exit.
        """
        ends = zip(_visits(rows), rows["emit_ms"].tolist(), strict=True)
        # The exit has the time of the visit's end; another exit of the id belongs to another visit.
        watched = [self._watched.get(key, {}).get(end_ms) for key, end_ms in ends]
        silent = np.maximum(rows["emit_ms"] - idle_ms - rows["request_ms"], 0).tolist()
        return np.array(
            [last if value is None else round(value) for value, last in zip(watched, silent, strict=True)], np.int64
        )

    def arrived_ms(self, rows: Rows) -> np.ndarray:
        """Return the arrival time of each behaviour, ``[n, behaviours]`` int64 by the clock; ``NEVER`` if unknown."""
        out = np.full(rows["label"].shape, NEVER, np.int64)
        for row, key in enumerate(_visits(rows)):
            for behaviour, arrived_ms in self._arrived.get(key, {}).items():
                out[row, behaviour] = arrived_ms
        return out

    @property
    def visits(self) -> int:
        """Approximate number of visits in the store."""
        return max(len(self._features), len(self._watched), len(self._arrived))

    def keep_only(self, unfinished: set[_Visit]) -> None:
        """Drop all visits except the unfinished ones."""
        for by_visit in (self._features, self._watched, self._arrived):
            for key in [key for key in by_visit if key not in unfinished]:
                del by_visit[key]

    def state_dict(self) -> Columns:
        """Return the content of the store as plain arrays."""
        features = [(*key, ms, values) for key, by_time in self._features.items() for ms, values in by_time.items()]
        watched = [(*key, ms, value) for key, by_time in self._watched.items() for ms, value in by_time.items()]
        arrived = [(*key, k, ms) for key, by_kind in self._arrived.items() for k, ms in by_kind.items()]
        return {
            "requests": np.array([row[:3] for row in features], np.int64).reshape(-1, 3),
            **{
                name: np.array([row[3][column] for row in features], empty.dtype).reshape(len(features), *empty.shape)
                for column, (name, empty) in enumerate(self._empty.items())
            },
            "exits": np.array([row[:3] for row in watched], np.int64).reshape(-1, 3),
            "watched": np.array([row[3] for row in watched], np.float64),
            "arrivals": np.array(arrived, np.int64).reshape(-1, 4),
        }

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Replace the content of the store by a saved state."""
        self._features, self._watched, self._arrived = {}, {}, {}
        features = zip(*(np.asarray(state[name]) for name in FEATURES), strict=True)
        for (user, visit, ms), values in zip(state["requests"].tolist(), features, strict=True):
            self._features.setdefault((user, visit), {})[ms] = values
        for (user, visit, ms), value in zip(state["exits"].tolist(), state["watched"].tolist(), strict=True):
            self._watched.setdefault((user, visit), {})[ms] = value
        for user, visit, behaviour, ms in state["arrivals"].tolist():
            self._arrived.setdefault((user, visit), {})[behaviour] = ms


def _visits(columns: Mapping[str, np.ndarray], at: np.ndarray | slice = slice(None)) -> list[_Visit]:
    """Return the visit of each event or row at positions ``at``."""
    return list(zip(columns["user_id"][at].tolist(), columns["visit_id"][at].tolist(), strict=True))
