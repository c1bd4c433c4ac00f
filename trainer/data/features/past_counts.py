"""Counts of the user's past visits as inputs: all of them, or those that share something with the candidate.

The statistics of a row count all users' rows, and rows are exposures of candidates only. These counts are over the
user's own history as of the request, in both domains: what the user did in earlier visits to the candidate's author or
with items of the candidate's tag, and with a half life what the user did just now.
"""

from __future__ import annotations

import numpy as np

from modules.visit_counts import count_visits
from trainer.config.features import FeatureConfig, PastConfig
from trainer.data.format.history import Histories
from trainer.data.format.schema import DOMAINS, UNKNOWN, DatasetSpec, Rows

MINUTE_MS = 60_000


def past_name(name: str) -> str:
    """Return the name of counts as a key of numbers, such as ``past:author``."""
    return f"past:{name}"


class PastCounts:
    """Reads the counts that a job declares.

    Args:
        spec: description of the dataset.
        config: the ``[features]`` section of the job.

    Attributes:
        keys: names of the counts, in order.
    """

    def __init__(self, spec: DatasetSpec, config: FeatureConfig) -> None:
        self._past = config.past
        self.keys = tuple(past_name(name) for name in config.past)
        self._behaviours = len(spec.behaviours)
        self._side = len(spec.side)
        self._tag = [side.name for side in spec.side].index(spec.tag) if spec.tag else None

    def prepare(self, histories: Histories) -> None:
        """Compile the kernels that the counts need, by counting for no rows."""
        nobody = {f"{name}_id": np.zeros(0, np.int64) for name in ("user", "author", "item")}
        nobody["side"] = np.zeros((0, self._side), np.int32)
        self.read(nobody, histories, np.zeros(0, np.int64))

    def read(self, rows: Rows, histories: Histories, as_of_ms: np.ndarray) -> np.ndarray:
        """Return the counts, ``[n, keys * (1 + behaviours)]`` float32: for each key visits, then each behaviour.

        Args:
            rows: n canonical rows.
            histories: histories of the dataset.
            as_of_ms: ``[n]`` int64; only visits that ended before this time count, and their ages count from it.
        """
        if not self._past:
            return np.zeros((len(as_of_ms), 0), np.float32)
        first, stop = histories.runs(rows["user_id"], as_of_ms)
        parts = [self._count(past, rows, histories, as_of_ms, first, stop) for past in self._past.values()]
        return np.concatenate(parts, axis=1)

    def _count(
        self,
        past: PastConfig,
        rows: Rows,
        histories: Histories,
        as_of_ms: np.ndarray,
        first: np.ndarray,
        stop: np.ndarray,
    ) -> np.ndarray:
        """Return the counts of one key, ``[n, 1 + behaviours]`` float32."""
        if past.domain != "both":
            domain = DOMAINS.index(past.domain)
            first, stop = first[:, [domain]], stop[:, [domain]]
        column = candidate = None
        if past.same == "tag":
            assert self._tag is not None, "the dataset has no tags"
            column = histories.column("tag")
            candidate = rows["side"][:, self._tag].astype(column.dtype)
            # An unknown tag is no tag that visits can share.
            stop = np.where((candidate == UNKNOWN)[:, None], first, stop)
        elif past.same != "any":
            column, candidate = histories.column(f"{past.same}_id"), rows[f"{past.same}_id"]
        known_ms, bits = histories.column("known_ms"), histories.column("bits")
        half_life_ms = past.half_life_minutes * MINUTE_MS
        return count_visits(first, stop, as_of_ms, known_ms, bits, self._behaviours, half_life_ms, column, candidate)
