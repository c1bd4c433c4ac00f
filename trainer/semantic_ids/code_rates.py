"""Rates of behaviours in the segments of a code against all segments, with intervals and a bound on false finds.

The rate of a behaviour is ``N / B``: its events over hours watched, or over exposures. Events are not independent:
segments of one author share that author, and a user may act in many segments. So the sums over the segments of a code
are split into cells, one for each author (or user) in it, and the spread of the cells decides. For a rate ``r``, with
``N_i`` and ``B_i`` of the cells of a code::

    t(r)^2 = (N - r B)^2 / sum_i (N_i - r B_i)^2              score statistic with the variance over the cells

Each of three of them must exceed its bound before a rate is outside of the interval: that over authors, that over
users, and one whose variance is ``phi r B``. ``phi`` is the variance of an event count over its mean, pooled over the
cells of all codes around the rate of each code, and at least 1. The third one is there for rare events: twenty cells
without a gift have no spread, and would prove nothing. The bounds are those of Student's t with
``B^2 / sum_i B_i^2 - 1`` degrees of freedom, that is with the number of cells that count. All three are quadratic in
``r``, so the interval has a closed form.

A resampling of authors gives the same intervals where there are many events. It is not used, since a thousand resamples
cannot tell 1 in 1,000 from 1 in 1,000,000, and with 20,000 codes it is the latter that counts.

A code *carries* a behaviour if its interval excludes the rate of all segments. The level of the intervals is chosen
after Benjamini and Hochberg over all tested pairs of code and behaviour, so that the expected share of false finds is
at most ``FALSE_FINDS``; the intervals shown are those of Benjamini and Yekutieli (2005) for selected parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

FALSE_FINDS = 0.05
"""Bound on the expected share of false finds among the pairs of code and behaviour that are named."""

LEAST_CELLS = 5.0
"""Least effective number of authors, and of users, in a code that is tested."""


@dataclass
class CellSums:
    """Sums over the cells of each code, float64.

    Attributes:
        events, base: ``[codes, behaviours]``, N and B.
        events_squared, product, base_squared: ``[codes, behaviours]``, sums over the cells of ``N_i^2``, ``N_i B_i``
            and ``B_i^2``.
    """

    events: np.ndarray
    base: np.ndarray
    events_squared: np.ndarray
    product: np.ndarray
    base_squared: np.ndarray

    @staticmethod
    def zeros(codes: int, behaviours: int) -> CellSums:
        """Return sums over no cells."""
        return CellSums(*(np.zeros((codes, behaviours)) for _ in range(5)))

    def add(self, behaviour: int, code: np.ndarray, events: np.ndarray, base: np.ndarray) -> None:
        """Add cells of a behaviour: code, events and base, ``[m]`` each; a cell is added once."""
        self.add_events(behaviour, code, events, base)
        self.add_base(behaviour, code, base)

    def add_events(self, behaviour: int, code: np.ndarray, events: np.ndarray, base: np.ndarray) -> None:
        """Add the events of cells, whose base is added by :meth:`add_base`; cells without an event may be left out."""
        sums = (self.events, self.events_squared, self.product)
        for total, values in zip(sums, (events, events * events, events * base), strict=True):
            total[:, behaviour] += np.bincount(code, values, minlength=len(total))

    def add_base(self, behaviour: int, code: np.ndarray, base: np.ndarray) -> None:
        """Add the base of cells; cells without a base may be left out."""
        for total, values in ((self.base, base), (self.base_squared, base * base)):
            total[:, behaviour] += np.bincount(code, values, minlength=len(total))

    def effective(self) -> np.ndarray:
        """Return the effective number of cells, ``[codes, behaviours]``; 0 for a code without any base."""
        return np.divide(self.base**2, self.base_squared, out=np.zeros_like(self.base), where=self.base_squared > 0)

    def spread(self, rate: np.ndarray) -> np.ndarray:
        """Return the sum over the cells of ``(N_i - r B_i)^2`` for rates that broadcast, ``[codes, behaviours]``."""
        return self.events_squared - 2 * rate * self.product + rate**2 * self.base_squared


class CodeRates(NamedTuple):
    """Rates of behaviours by code.

    Attributes:
        overall: ``[behaviours]``, rate over the segments of all codes; nan without any base.
        rate: ``[codes, behaviours]``; nan without any base.
        low, high: ``[codes, behaviours]``, interval at :attr:`level`; nan for a pair that is not tested.
        p_value: ``[codes, behaviours]``; nan for a pair that is not tested.
        carries: ``[codes, behaviours]`` int8: 1 if the interval is above the overall rate, -1 if it is below, 0
            otherwise.
        tested: number of tested pairs.
        level: level of the intervals, such as 0.9993.
    """

    overall: np.ndarray
    rate: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p_value: np.ndarray
    carries: np.ndarray
    tested: int
    level: float


def code_rates(authors: CellSums, users: CellSums, false_finds: float = FALSE_FINDS) -> CodeRates:
    """Return the rates of the codes with their intervals; the rules are at the top of this module.

    Args:
        authors: sums over cells of author and code.
        users: sums of the same events over cells of user and code.
        false_finds: see ``FALSE_FINDS``.
    """
    events, base = authors.events, authors.base
    with np.errstate(all="ignore"):
        overall = events.sum(0) / base.sum(0)
        rate = events / base
        cells = [sums.effective() for sums in (authors, users)]
        least = np.minimum(*cells)
        pooled = [_dispersion(sums, least) for sums in (authors, users)]
        dispersion = np.maximum(1, np.maximum(*pooled))
        # A behaviour without any event, or with nothing but events, has nothing to test.
        testable = (least >= LEAST_CELLS) & (overall > 0)
        apart = (events - overall * base) ** 2
        z = normal_of_t(np.sqrt(apart / (dispersion * overall * base)), least - 1)
        for sums, count in zip((authors, users), cells, strict=True):
            squared = np.minimum(apart / sums.spread(overall), count * (1 - 1e-12))
            # The score statistic of n equal cells is a function of the t statistic.
            z = np.fmin(z, normal_of_t(np.sqrt(squared * (count - 1) / (count - squared)), count - 1))
        p_value = np.where(testable, torch.special.erfc(torch.from_numpy(z / np.sqrt(2))).numpy(), np.nan)
        tested = int(testable.sum())
        alpha = _alpha(p_value[testable], false_finds)
        low, high = _intervals((authors, users), cells, dispersion, alpha)
    low, high = (np.where(testable, bound, np.nan) for bound in (low, high))
    found = np.nan_to_num(p_value, nan=1.0) <= (alpha if tested else 0.0)
    carries = np.where(found, np.sign(events - overall * base), 0).astype(np.int8)
    return CodeRates(overall, rate, low, high, p_value, carries, tested, 1 - alpha)


def normal_of_t(t: np.ndarray, freedom: np.ndarray) -> np.ndarray:
    """Return the normal deviate with the tail of a value of Student's t, after Wallace (1959); t is 0 or more."""
    return (8 * freedom + 1) / (8 * freedom + 3) * np.sqrt(freedom * np.log1p(t * t / freedom))


def t_of_normal(z: float, freedom: np.ndarray) -> np.ndarray:
    """Return the value of Student's t with the tail of a normal deviate, the inverse of :func:`normal_of_t`."""
    scaled = z * (8 * freedom + 3) / (8 * freedom + 1)
    return np.sqrt(freedom * np.expm1(scaled * scaled / freedom))


def _dispersion(cells: CellSums, least: np.ndarray) -> np.ndarray:
    """Return phi of each behaviour, ``[behaviours]``; 0 where nothing happened.

    Args:
        cells: the sums.
        least: ``[codes, behaviours]``, effective number of cells; of the codes with too few nothing is used.
    """
    count, used = cells.effective(), (least >= LEAST_CELLS) & (cells.events > 0)
    # Around their own rate, n cells have n - 1 degrees of freedom.
    expected = np.where(used, cells.events * (1 - 1 / count), 0).sum(0)
    spread = np.where(used, cells.spread(cells.events / cells.base), 0).sum(0)
    return np.divide(spread, expected, out=np.zeros(expected.shape), where=expected > 0)


def _alpha(p_values: np.ndarray, false_finds: float) -> float:
    """Return the largest p-value that is found after Benjamini and Hochberg; of a find if there is none."""
    ordered = np.sort(p_values)
    bounds = false_finds * np.arange(1, len(ordered) + 1) / max(1, len(ordered))
    below = np.flatnonzero(ordered <= bounds)
    return float(bounds[below[-1]] if len(below) else false_finds / max(1, len(ordered)))


def _intervals(
    sums: tuple[CellSums, CellSums], cells: list[np.ndarray], dispersion: np.ndarray, alpha: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the bounds of the rates that no more than two of the three statistics exclude."""
    z = float(torch.special.ndtri(torch.tensor(1 - alpha / 2, dtype=torch.float64)))
    events, base = sums[0].events, sums[0].base
    squared = t_of_normal(z, np.minimum(*cells) - 1) ** 2
    bounds = [_roots(base**2, 2 * events * base + squared * dispersion * base, events**2)]
    for found, count in zip(sums, cells, strict=True):
        t = t_of_normal(z, count - 1) ** 2
        share = count * t / (count - 1 + t)
        bounds.append(
            _roots(
                base**2 - share * found.base_squared,
                2 * (events * base - share * found.product),
                events**2 - share * found.events_squared,
            )
        )
    low, high = (np.stack(bound) for bound in zip(*bounds, strict=True))
    return np.maximum(np.fmin.reduce(low), 0), np.fmax.reduce(high)


def _roots(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both roots of ``a r^2 - b r + c``, with a above 0."""
    half = np.sqrt(np.maximum(b * b - 4 * a * c, 0))
    return (b - half) / (2 * a), (b + half) / (2 * a)
