"""Rules that foresee the next code without a network, on the rows of Foresight, with probabilities for all codes.

Every rule is a chain of counts that back off to others. A link turns counts ``n(c)`` with the sum ``n`` into

    p(c) = (n(c) + weight * q(c)) / (n + weight)

where ``q`` is the link before it. The chains are:

=================  ============================================================================================
rule               links, the first one first
=================  ============================================================================================
last               targets of training; the code of the row's segment, once
most frequent      targets of training; runs of the author's past by code
by run length      targets of training; segments of the author's past by code
Markov             targets of training; targets of training after the same code
author's Markov    as Markov; segments of the author's past by code; of these, those that followed the same code
bayes              targets of training; the true distribution of the next code, as one count
=================  ============================================================================================

The author's past is what was known as of the row's time: at most the latest ``PAST_RUNS`` runs. The others are counts
of the training range, so nothing is learnt from the rows of the evaluation. The targets themselves back off to equal
probabilities. Each weight is the one of ``WEIGHTS`` with the best likelihood of the last fifth of the training range
under the counts of the rest; then the counts are made again from all of the training range.

The first three rules order the codes by the counts of their last link, and by the link before it where these are equal:
a large weight must not make "last" foresee the most frequent code. The others order them by their probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.semantic_ids.foresight_rows import ForesightRows

PAST_RUNS = 1_000

ROWS_AT_ONCE = 256
"""Rows of which the probabilities of all codes are in memory at a time."""

TUNING_ROWS = 4_096
"""Most rows of the training range on which a weight is chosen."""

TUNING_SHARE = 0.2

WEIGHTS = tuple(2.0**power for power in range(-10, 16))

LAST, FREQUENT, BY_LENGTH, BAYES = "last", "most frequent", "by run length", "bayes"

PLAIN = (LAST, FREQUENT, BY_LENGTH)
"""Rules that order the codes by their counts."""

TOP = 10
"""Codes among which the target counts as found in ``top_10``."""


@dataclass
class Quality:
    """Sums over rows of how well their codes were foreseen.

    Attributes:
        rows: number of rows.
        first: rows whose target is the most probable code.
        among_ten: rows whose target is among the ten most probable codes.
        loss: sum of ``-log p(target)``, in nats.
    """

    rows: int = 0
    first: int = 0
    among_ten: int = 0
    loss: float = 0.0

    def add(self, log_p: np.ndarray, target: np.ndarray, order: np.ndarray | None = None) -> None:
        """Add rows.

        Args:
            log_p: ``[n, codes]``, log-probabilities.
            target: ``[n]``, the codes that came.
            order: ``[n, codes]``, a code with a larger value comes before others, and of equal ones the smaller code;
                None takes the probabilities.
        """
        order = log_p if order is None else order
        own = np.take_along_axis(order, target[:, None], axis=1)
        before = (order > own).sum(1) + ((order == own) & (np.arange(order.shape[1]) < target[:, None])).sum(1)
        self.rows += len(target)
        self.first += int((before == 0).sum())
        self.among_ten += int((before < TOP).sum())
        self.loss -= float(np.take_along_axis(log_p, target[:, None], axis=1).sum(dtype=np.float64))

    def __iadd__(self, other: Quality) -> Quality:
        """Add the rows of another one."""
        self.rows += other.rows
        self.first += other.first
        self.among_ten += other.among_ten
        self.loss += other.loss
        return self

    def document(self) -> dict[str, float | None]:
        """Return the means; None without rows."""
        sums = {"top_1": self.first, "top_10": self.among_ten, "nll": self.loss}
        return {name: value / self.rows if self.rows else None for name, value in sums.items()}


Links = list[np.ndarray]
"""Counts ``[n, codes]`` of each link of a chain, for some rows."""


class Baselines:
    """The rules, fitted on the training range.

    Args:
        rows: all rows.
        training: ``[m] int64``, rows of the training range, in the order of time.
        codes: number of codes.
        truth: ``[segments, codes]``, true distribution of the code after each segment of the arrays from which the
            rows were made; None if nobody knows it.

    Attributes:
        weights: rule -> weight of each link.
    """

    def __init__(self, rows: ForesightRows, training: np.ndarray, codes: int, truth: np.ndarray | None = None) -> None:
        self._rows, self._codes, self._truth = rows, codes, truth
        self._rules: dict[str, Callable[[np.ndarray], Links]] = {
            LAST: lambda part: [self._last(part)],
            FREQUENT: lambda part: [self._past(part)[0]],
            BY_LENGTH: lambda part: [self._past(part)[1]],
            "Markov": lambda part: [self._after(part)],
            "author's Markov": lambda part: [self._after(part), *self._past(part)[1:]],
        }
        if truth is not None:
            self._rules[BAYES] = lambda part: [self._true(part)]
        border = len(training) - int(TUNING_SHARE * len(training))
        tuning = training[border:]
        tuning = tuning[:: max(1, len(tuning) // TUNING_ROWS)]
        self._count(training[:border])
        self.weights = {name: self._tune(rule, tuning) for name, rule in self._rules.items()}
        self._count(training)

    @property
    def names(self) -> Sequence[str]:
        """Names of the rules."""
        return list(self._rules)

    def probabilities(self, name: str, part: np.ndarray) -> np.ndarray:
        """Return the probabilities ``[n, codes] float64`` of a rule for some rows ``[n]``."""
        return self._foresee(name, part)[0]

    def _foresee(self, name: str, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the probabilities of a rule, and the values by which it orders the codes, ``[n, codes]`` each."""
        links = self._rules[name](part)
        p = self._chain(links, self.weights[name])
        if name not in PLAIN:
            return p, p
        # Counts are whole numbers, and half a probability is less than 1.
        return p, links[-1] + self._chain(links[:-1], self.weights[name][:-1]) / 2

    def measure(self, part: np.ndarray) -> dict[str, Quality]:
        """Return the quality of each rule on some rows."""
        found = {name: Quality() for name in self._rules}
        for begin in range(0, len(part), ROWS_AT_ONCE):
            block = part[begin : begin + ROWS_AT_ONCE]
            for name, quality in found.items():
                p, order = self._foresee(name, block)
                quality.add(np.log(p), self._rows.target[block], order)
        return found

    def _count(self, training: np.ndarray) -> None:
        """Count the targets, and the targets after each code, of the training range."""
        target = self._rows.target[training]
        self._targets = np.bincount(target, minlength=self._codes).astype(np.float64)
        pairs, self._pair_count = np.unique(self._rows.code[training] * self._codes + target, return_counts=True)
        self._pair_target = pairs % self._codes
        self._pair_first = np.searchsorted(pairs, np.arange(self._codes + 1) * self._codes)

    def _tune(self, rule: Callable[[np.ndarray], Links], tuning: np.ndarray) -> tuple[float, ...]:
        """Return the weights of a chain with the largest likelihood; the first one is of the training targets."""
        own: list[np.ndarray] = []
        for begin in range(0, len(tuning), ROWS_AT_ONCE):
            block = tuning[begin : begin + ROWS_AT_ONCE]
            target = self._rows.target[block]
            links = [np.broadcast_to(self._targets, (len(block), self._codes)), *rule(block)]
            taken = [(np.take_along_axis(link, target[:, None], 1)[:, 0], link.sum(1)) for link in links]
            own.append(np.array(taken))
        if not own:
            return (1.0,) * (len(rule(tuning)) + 1)
        counts = np.concatenate(own, axis=2)  # [links, 2, rows]

        def loss(weights: tuple[float, ...]) -> float:
            p = np.full(counts.shape[2], 1 / self._codes)
            for (of_target, total), weight in zip(counts, weights, strict=True):
                p = (of_target + weight * p) / (total + weight)
            return float(-np.log(p).mean())

        # One link after the other, from the first one on, until nothing improves.
        best = (1.0,) * len(counts)
        while True:
            before = best
            for link in range(len(counts)):
                options = ((*best[:link], weight, *best[link + 1 :]) for weight in WEIGHTS)
                best = min(options, key=loss)
            if best == before:
                return best

    def _chain(self, links: Links, weights: tuple[float, ...]) -> np.ndarray:
        p = np.full((1, self._codes), 1 / self._codes)
        for link, weight in zip([self._targets[None], *links], weights, strict=True):
            p = (link + weight * p) / (link.sum(1, keepdims=True) + weight)
        return p

    def _last(self, part: np.ndarray) -> np.ndarray:
        return self._dense(np.arange(len(part)), self._rows.code[part], len(part))

    def _past(self, part: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return runs by code, segments by code, and segments by code that followed one with the row's code."""
        longest = int(self._rows.run_counts(part).max(initial=1))
        code, length = self._rows.contexts(part, min(PAST_RUNS, longest))
        row, place = np.nonzero(code >= 0)
        of_run, segments = code[row, place], length[row, place]
        same = code == self._rows.code[part][:, None]
        # Inside a run its code follows itself; after it comes the first segment of the next run.
        follows = np.where(same, length - 1, 0)
        follows[:, 1:] += same[:, :-1] & self._rows.joined(part, code.shape[1])[:, 1:]
        return (
            self._dense(row, of_run, len(part)),
            self._dense(row, of_run, len(part), segments),
            self._dense(row, of_run, len(part), follows[row, place]),
        )

    def _after(self, part: np.ndarray) -> np.ndarray:
        code = self._rows.code[part]
        first, stop = self._pair_first[code], self._pair_first[code + 1]
        row = np.repeat(np.arange(len(part)), stop - first)
        place = np.arange(len(row)) - np.repeat(np.cumsum(stop - first) - stop, stop - first)
        return self._dense(row, self._pair_target[place], len(part), self._pair_count[place])

    def _true(self, part: np.ndarray) -> np.ndarray:
        assert self._truth is not None
        true: np.ndarray = self._truth[self._rows.segment[part]].astype(np.float64)
        return true

    def _dense(self, row: np.ndarray, code: np.ndarray, rows: int, weight: np.ndarray | None = None) -> np.ndarray:
        """Return the sums of the weights by row and code, ``[rows, codes] float64``."""
        sums = np.bincount(row * self._codes + code, weight, rows * self._codes)
        return sums.reshape(rows, self._codes).astype(np.float64, copy=False)
