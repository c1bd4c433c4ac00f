"""Spread of the ids of a step over the rows of a table: even, by Zipf's law, or as they were counted."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_EXACT_RANKS = 4096
"""Most popular ids that are summed one by one."""

_BINS = 4096
"""Ranges of less popular ids, each with one probability."""


class RowSpread(NamedTuple):
    """Cumulative share of the sent ids over the rows of a table.

    Attributes:
        places: ascending shares of the rows, from 0 to 1.
        shares: share of the sent ids whose rows lie before each place, from 0 to 1.
    """

    places: tuple[float, ...] = (0.0, 1.0)
    shares: tuple[float, ...] = (0.0, 1.0)

    def between(self, first: float, last: float) -> float:
        """Return the share of the ids whose rows lie between two shares of the rows."""
        low, high = np.interp([first, last], self.places, self.shares)
        return float(high - low)


EVEN = RowSpread()


def zipf_ids(
    ids: float, population: int, exponent: float, *, deduplicate: bool, ordered: bool
) -> tuple[float, RowSpread]:
    """Return the ids that a rank sends if they are drawn by Zipf's law, and how they fall on the rows.

    The id of popularity rank r has the probability ``p_r = r^-s / sum``, and is among ``n`` drawn ids with the
    probability ``1 - (1 - p_r)^n``. The sum of these is the expected number of distinct ids.

    Args:
        ids: ids that a rank reads in a step, ``n``.
        population: number of ids that can be drawn.
        exponent: ``s``; 0 draws evenly.
        deduplicate: each id is sent once.
        ordered: popular ids have rows side by side, the worst case of a table whose rows are numbered by id. Otherwise
            rows are in no order, and the most popular id alone makes its owner busier than the others.
    """
    last = np.unique(
        np.concatenate(
            [
                np.arange(1, min(population, _EXACT_RANKS) + 1),
                np.geomspace(min(population, _EXACT_RANKS), population, _BINS).round().astype(np.int64),
            ]
        )
    )
    width = np.diff(last, prepend=0).astype(np.float64)
    # The geometric mean of the ranks of a range; a range of one id has that of the id.
    rank = np.sqrt((last - width + 1) * last)
    weight = rank**-exponent
    probability = weight / (width * weight).sum()
    each = -np.expm1(ids * np.log1p(-np.minimum(probability, 1 - 1e-12))) if deduplicate else ids * probability
    sent = np.cumsum(width * each)
    if not sent[-1]:
        return 0.0, EVEN
    if ordered:
        places, shares = last / population, sent / sent[-1]
        return float(sent[-1]), RowSpread((0.0, *places.tolist()), (0.0, *shares.tolist()))
    if population == 1:
        return float(sent[-1]), EVEN
    return float(sent[-1]), RowSpread((0.0, 1 / population, 1.0), (0.0, float(each[0] / sent[-1]), 1.0))


def counted_spread(rows: np.ndarray, table_rows: int, blocks: int = 4096) -> RowSpread:
    """Return the spread of ids that were counted.

    Args:
        rows: row of each sent id.
        table_rows: rows of the table.
        blocks: equal parts of the table that are told apart.
    """
    if not len(rows):
        return EVEN
    counts = np.bincount(rows * blocks // table_rows, minlength=blocks)
    shares = np.cumsum(counts) / len(rows)
    return RowSpread(tuple(np.linspace(0, 1, blocks + 1).tolist()), (0.0, *shares.tolist()))
