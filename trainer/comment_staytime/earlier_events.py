"""Search for what a user had done before a request: runs of earlier events of the same group."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def earlier_events(
    groups: Sequence[np.ndarray], owner: np.ndarray, known_ms: np.ndarray, request_ms: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find for each visit the events of its group that were known strictly before its request.

    An event that becomes known in the millisecond of a request does not count: it could be of the visit itself, which
    can end as soon as it begins.

    Args:
        groups: arrays ``[visits]`` int64; visits that agree in all of them are of one group.
        owner: ``[events]`` int64, the visit of each event; the event is of that visit's group.
        known_ms: ``[events]`` int64, time from which each event is known.
        request_ms: ``[visits]`` int64.

    Returns:
        ``order [events]``, positions of the events by group and time; and ``first`` and ``stop``, each ``[visits]``:
        ``order[first[i]:stop[i]]`` are the events known at the request of visit ``i``, the oldest first. All int64.
    """
    visits, events = len(request_ms), len(owner)
    # Sort requests and events together, at equal times the request first. The events that come before a request are
    # then the entries right before it.
    rows = np.concatenate([np.arange(visits), owner])
    is_event = np.arange(visits + events) >= visits
    times = np.concatenate([request_ms, known_ms])
    sorted_groups = [group[rows] for group in groups]
    entries = np.lexsort((is_event, times, *sorted_groups))
    is_event = is_event[entries]
    new = np.ones(len(entries), bool)
    new[1:] = np.any([group[entries[1:]] != group[entries[:-1]] for group in sorted_groups], axis=0)
    counted = np.cumsum(is_event)
    # Number of events before the first entry of the same group: the search must not go back further.
    before_group: np.ndarray = (counted - is_event)[np.flatnonzero(new)][np.cumsum(new) - 1]
    first, stop = np.empty((2, visits), np.int64)
    requests = entries[~is_event]
    first[requests], stop[requests] = before_group[~is_event], counted[~is_event]
    return entries[is_event] - visits, first, stop
