"""The loops of a dynamic table's id map, compiled: ids of a step against the buckets of rows that may hold them.

An id's bucket is a run of rows: ``first`` to ``last`` (excluded) below, places in the arrays of one shard. Each row has
the id that it serves and one candidate, an id that is only counted. ``seen`` is the step of the last sighting, 0 where
there is no id.
"""

from __future__ import annotations

import numpy as np
from numba import njit

Columns = tuple[np.ndarray, np.ndarray, np.ndarray]
"""``id``, ``seen`` and ``sightings`` of each row, or of its candidate."""

RECENCY, FREQUENCY, BOTH = 0, 1, 2
"""Policies of eviction."""


@njit(cache=True)
def find(
    ids: np.ndarray, first: np.ndarray, last: np.ndarray, id_of: np.ndarray, seen: np.ndarray, row: np.ndarray
) -> None:
    """Write the row of each id, -1 where it has none. Reads only."""
    for i in range(len(ids)):
        row[i] = _place(ids[i], first[i], last[i], id_of, seen)


@njit(cache=True)
def sight(ids: np.ndarray, first: np.ndarray, last: np.ndarray, step: int, served: Columns, row: np.ndarray) -> int:
    """As :func:`find`; rows that are found count a sighting. Returns how many did, each once in a step."""
    id_of, seen, sightings = served
    counted = 0
    for i in range(len(ids)):
        place = _place(ids[i], first[i], last[i], id_of, seen)
        row[i] = place
        if place >= 0 and seen[place] != step:
            seen[place] = step
            sightings[place] += 1
            counted += 1
    return counted


@njit(cache=True)
def admit(
    ids: np.ndarray,
    first: np.ndarray,
    last: np.ndarray,
    step: int,
    admit_after: int,
    policy: int,
    served: Columns,
    candidates: Columns,
    row: np.ndarray,
) -> int:
    """Count ids that have no row, and give rows to those that have earned one.

    Args:
        ids: ``[n]`` int64, distinct; they come in this order.
        first, last: ``[n]`` int64, their buckets.
        step: of the sightings.
        admit_after: sightings from which on an id may have a row.
        policy: of eviction.
        served, candidates: of each row; changed.
        row: ``[n]`` int64, written: the new row, -1 where there is none.

    Returns:
        How many ids were evicted.
    """
    id_of, seen, sightings = served
    candidate_of, candidate_seen, candidate_sightings = candidates
    evicted = 0
    for i in range(len(ids)):
        known = _place(ids[i], first[i], last[i], candidate_of, candidate_seen)
        count = 1 if known < 0 else candidate_sightings[known] + 1
        place = -1
        if count >= admit_after:
            place = _row_for(count, first[i], last[i], step, policy, seen, sightings)
        row[i] = place
        if place >= 0:
            evicted += seen[place] > 0
            id_of[place], seen[place], sightings[place] = ids[i], step, count
            if known >= 0:
                candidate_seen[known] = 0
            continue
        if known < 0:
            known = _oldest(first[i], last[i], candidate_seen)
            if candidate_seen[known] == step:
                continue
            candidate_of[known] = ids[i]
        candidate_seen[known], candidate_sightings[known] = step, count
    return evicted


@njit(cache=True)
def _place(value: int, first: int, last: int, id_of: np.ndarray, seen: np.ndarray) -> int:
    for place in range(first, last):
        if id_of[place] == value and seen[place] > 0:
            return place
    return -1


@njit(cache=True)
def _oldest(first: int, last: int, seen: np.ndarray) -> int:
    """The first of the places that were seen least recently, or never."""
    oldest = first
    for place in range(first + 1, last):
        if seen[place] < seen[oldest]:
            oldest = place
    return oldest


@njit(cache=True)
def _row_for(count: int, first: int, last: int, step: int, policy: int, seen: np.ndarray, sightings: np.ndarray) -> int:
    """A free row, else that of the id worth least if the new one is worth as much; -1 if there is none."""
    chosen = -1
    worst, worst_tie = np.inf, np.inf
    for place in range(first, last):
        if seen[place] == 0:
            return place
        if seen[place] == step:
            continue
        if policy == RECENCY:
            worth, tie = float(seen[place]), float(sightings[place])
        elif policy == FREQUENCY:
            worth, tie = float(sightings[place]), float(seen[place])
        else:
            worth, tie = sightings[place] / (1.0 + step - seen[place]), float(seen[place])
        if worth < worst or (worth == worst and tie < worst_tie):
            chosen, worst, worst_tie = place, worth, tie
    own = float(step) if policy == RECENCY else float(count)
    return chosen if worst <= own else -1
