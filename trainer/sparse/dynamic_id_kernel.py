"""Compiled loops of a dynamic table's id map: they compare the ids of a step with the buckets that may hold them.

An id's bucket is a range of rows, from ``first`` up to but not including ``last``, which are places in the arrays of
one shard. Each row has the id that it serves and one candidate, an id that is only counted. ``seen`` is the step of the
last sighting, 0 if there is no id.
"""

from __future__ import annotations

import numpy as np

from modules.compiled import compiled

Columns = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Arrays ``id``, ``seen`` and ``sightings`` of the rows, or of their candidates."""

RECENCY, FREQUENCY, BOTH = 0, 1, 2
"""Eviction policies."""


@compiled("the id maps of dynamic tables")
def find(
    ids: np.ndarray, first: np.ndarray, last: np.ndarray, id_of: np.ndarray, seen: np.ndarray, row: np.ndarray
) -> None:
    """Write the row of each id to ``row``, -1 if it has none; the other arrays do not change."""
    for i in range(len(ids)):
        row[i] = _place(ids[i], first[i], last[i], id_of, seen)


@compiled("the id maps of dynamic tables")
def sight(ids: np.ndarray, first: np.ndarray, last: np.ndarray, step: int, served: Columns, row: np.ndarray) -> int:
    """Find rows as :func:`find` does and count a sighting of each row found; return the number of these rows.

    A row counts one sighting in a step, however often its id occurs.
    """
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


@compiled("the id maps of dynamic tables")
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
    """Count sightings of ids that have no row, and give a row to each one that has enough.

    Args:
        ids: ``[n]`` int64, unique; processed in this order.
        first, last: ``[n]`` int64, their buckets.
        step: number of the training step.
        admit_after: number of sightings from which on an id may have a row.
        policy: eviction policy.
        served, candidates: columns of the rows and of their candidates; changed.
        row: ``[n]`` int64, written: the new row, -1 if the id got none.

    Returns:
        Number of ids that were evicted.
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
            # All candidates of the bucket were seen in this step: the new id is not counted.
            if candidate_seen[known] == step:
                continue
            candidate_of[known] = ids[i]
        candidate_seen[known], candidate_sightings[known] = step, count
    return evicted


@compiled("the id maps of dynamic tables")
def _place(value: int, first: int, last: int, id_of: np.ndarray, seen: np.ndarray) -> int:
    """Return the place of an id in its bucket, -1 if it is not there."""
    for place in range(first, last):
        if id_of[place] == value and seen[place] > 0:
            return place
    return -1


@compiled("the id maps of dynamic tables")
def _oldest(first: int, last: int, seen: np.ndarray) -> int:
    """Return the first of the places of a bucket that were seen least recently, or never."""
    oldest = first
    for place in range(first + 1, last):
        if seen[place] < seen[oldest]:
            oldest = place
    return oldest


@compiled("the id maps of dynamic tables")
def _row_for(count: int, first: int, last: int, step: int, policy: int, seen: np.ndarray, sightings: np.ndarray) -> int:
    """Return a free row, or else the row of the least valuable id.

    Returns -1 if every id was seen in this step, or if the least valuable one is worth more than the new id.
    """
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
