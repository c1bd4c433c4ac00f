"""Features of an author's recent codes: the latest runs as of a time, padded. Training and scoring both call this.

The reader is a store of recent codes (scoring, live), or :class:`trainer.semantic_ids.code_files.CodesAsOf` (training
from a file). Both answer with what was known at ``as_of_ms``, so replay and live give equal features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from trainer.semantic_ids.code_store import RecentRuns

NO_CODE = -1


class RunReader(Protocol):
    """Reading half of a store of recent codes."""

    def recent(self, authors: np.ndarray, as_of_ms: np.ndarray, runs: int) -> RecentRuns:
        """Return the latest runs, see :meth:`trainer.semantic_ids.code_store.CodeStore.recent`."""
        ...


@dataclass(frozen=True)
class RunFeatures:
    """Latest runs of n rows, the newest run of each row last; free places are at the front.

    Attributes:
        code: ``[n, runs] int32``, ``NO_CODE`` at a free place.
        length: ``[n, runs] int32``, number of segments; 0 at a free place.
        age_ms: ``[n] int64``, time since the latest segment became known; -1 for a row without any.
        no_code: number of rows without any run: unknown authors, and authors without a known segment.
    """

    code: np.ndarray
    length: np.ndarray
    age_ms: np.ndarray
    no_code: int


def run_features(reader: RunReader, authors: np.ndarray, as_of_ms: np.ndarray, runs: int) -> RunFeatures:
    """Return the features of n requests, each from the segments that were known at its time.

    Args:
        reader: store or file of codes.
        authors: ``[n] int64``.
        as_of_ms: ``[n] int64``, times of the requests.
        runs: number of runs.

    Raises:
        UserError: the store cannot be read, or does not keep so many runs.
    """
    found = reader.recent(authors, as_of_ms, runs)
    row = np.repeat(np.arange(len(authors)), found.counts)
    last = np.cumsum(found.counts)
    place = runs - last[row] + np.arange(len(row))
    code = np.full((len(authors), runs), NO_CODE, np.int32)
    length = np.zeros((len(authors), runs), np.int32)
    code[row, place], length[row, place] = found.code, found.length
    age_ms = np.full(len(authors), -1, np.int64)
    some = found.counts > 0
    age_ms[some] = as_of_ms[some] - found.last_ms[last[some] - 1]
    return RunFeatures(code, length, age_ms, int((~some).sum()))
