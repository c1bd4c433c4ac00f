"""Reactions of predictions to jumps of a room's click probability, for :mod:`benchmarks.moment`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from benchmarks.moment.metrics import BEFORE_S, WINDOW_S, Jump, running_mean, time_to_react
from benchmarks.moment.world import Segments, WorldExposures

LEAST_CHANGE = 0.05
"""Smaller changes of the mean click probability are hidden by the choice of users who are shown the room."""

RESPONSE_S = np.arange(-60.0, 605.0, 10.0)
"""Moments around a jump, in seconds, at which :func:`response` is measured."""

AGES_S = (0, 60, 120, 300, 600, 6000)
"""Edges of the ages of rooms, in seconds, by which predictions are evaluated."""


@dataclass(frozen=True)
class RoomJump:
    """A jump and the exposures of its room, in order of time.

    Attributes:
        jump: its time and the probabilities before and after.
        exposures: ``[n]`` int64, visits.
    """

    jump: Jump
    exposures: np.ndarray

    @property
    def rises(self) -> bool:
        """True if the click probability is higher afterwards."""
        return self.jump.after > self.jump.before


def room_jumps(segments: Segments, shown: WorldExposures, from_s: float, until_s: float) -> list[RoomJump]:
    """Return the jumps in a range of time between levels that both last for at least :data:`BEFORE_S`."""
    found = []
    counts = np.bincount(shown.segment, minlength=len(segments.opens))
    by_segment = np.split(np.argsort(shown.segment, kind="stable"), np.cumsum(counts)[:-1])
    for now in np.flatnonzero(~segments.opens).tolist():
        at_s, stop_s = float(segments.start_s[now]), min(float(segments.stop_s[now]), until_s)
        if at_s < from_s or stop_s - at_s < BEFORE_S or at_s - segments.start_s[now - 1] < BEFORE_S:
            continue
        before, after = by_segment[now - 1], by_segment[now]
        means = [float(shown.truth[visits, 0].mean()) for visits in (before, after)]
        if abs(means[1] - means[0]) >= LEAST_CHANGE:
            found.append(RoomJump(Jump(at_s, stop_s, *means), np.concatenate([before, after])))
    return found


def times(jumps: Sequence[RoomJump], shown: WorldExposures, click: np.ndarray) -> np.ndarray:
    """Return the time to react to each jump, ``[jumps]`` float64 seconds; infinite where the next jump came first.

    Args:
        jumps: of :func:`room_jumps`.
        shown: the exposures.
        click: ``[exposures]`` float64, predicted click probabilities.
    """
    return np.array([time_to_react(each.jump, shown.at_s[each.exposures], click[each.exposures]) for each in jumps])


def response(jumps: Sequence[RoomJump], shown: WorldExposures, click: np.ndarray) -> np.ndarray:
    """Return the share of jumps that predictions have covered at :data:`RESPONSE_S`, ``[moments]``: 0 none, 1 all.

    It sums over the jumps whose room has not jumped again, so larger ones weigh more; nan where there is none left.
    """
    moved, whole = np.zeros(len(RESPONSE_S)), np.zeros(len(RESPONSE_S))
    for each in jumps:
        at_s, value = shown.at_s[each.exposures], click[each.exposures]
        first, stop = np.searchsorted(at_s, (each.jump.at_s - BEFORE_S, each.jump.at_s))
        mean = running_mean(at_s, value, each.jump.at_s + RESPONSE_S, WINDOW_S)
        there = (each.jump.until_s - each.jump.at_s - WINDOW_S / 2 >= RESPONSE_S) & np.isfinite(mean)
        sign = 1 if each.rises else -1
        moved[there] += sign * (mean[there] - value[first:stop].mean())
        whole[there] += abs(each.jump.after - each.jump.before)
    with np.errstate(invalid="ignore"):
        return moved / whole


def by_age(segments: Segments, shown: WorldExposures, click: np.ndarray, which: np.ndarray) -> list[float]:
    """Return predicted divided by true click probability of rooms by their age, see :data:`AGES_S`.

    Args:
        segments: of the world.
        shown: its exposures.
        click: ``[exposures]``, predicted.
        which: ``[exposures]`` bool, those to evaluate.
    """
    first_segment = np.maximum.accumulate(np.where(segments.opens, np.arange(len(segments.opens)), 0))
    age_s = shown.at_s - segments.start_s[first_segment][shown.segment]
    groups = [which & (age_s >= low) & (age_s < high) for low, high in pairwise(AGES_S)]
    return [float(click[group].sum() / shown.truth[group, 0].sum()) for group in groups]
