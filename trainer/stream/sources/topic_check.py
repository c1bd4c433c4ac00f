"""Check that a topic fits the settings of a job, before one of its messages goes to the dead letters.

A few bad messages are dead letters. But in a topic of another partitioner or format most messages are bad, and training
on the others would hide the mistake, so the job is refused. Two things decide, in the latest messages of a partition:

* **The partitioner.** Under another partitioner a user is in the right one of ``N`` partitions with probability
  ``1 / N``. This is compared with a topic of which 5 % of the users are misplaced, by the likelihood ratio of the users
  in the window, each counted once. The job is refused if the ratio reaches a million to one: at ``N = 4`` if six users
  are misplaced and none is in its place, or if about a third of many users is misplaced.
* **The rejected messages**, for whatever reason: more than half of the window.

The window of an offset has the messages before it, and where a new job starts, the first messages that there are. It
depends on the log alone, because a job that resumes at an offset first reads the messages before it. So a job that is
started again decides as before, and on another number of ranks too. A new job does not look at what comes before its
start, such as messages from before a mistake of the producer was corrected.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn

import numpy as np

from trainer.config.stream import StreamConfig
from trainer.console.errors import UserError
from trainer.stream.sources.message_codec import DecodedMessages

WINDOW = {"json": 1000, "arrow": 50}
"""Number of messages in a window by format; Arrow messages usually have many events."""

_NO_USER = -1
_FEW_MISPLACED = 0.05
_CERTAINTY = math.log(1e6)


@dataclass(frozen=True)
class _Evidence:
    """Consecutive messages of a partition.

    Attributes:
        offset: ``[n]`` int64.
        user: ``[n]`` int64, user of the first readable event; ``_NO_USER`` without one.
        misplaced: ``[n]`` bool, the user belongs to another partition.
        rejected: ``[n]`` bool, more than half of the events were rejected.
    """

    offset: np.ndarray
    user: np.ndarray
    misplaced: np.ndarray
    rejected: np.ndarray

    def __len__(self) -> int:
        return len(self.offset)

    def part(self, first: int, stop: int | None = None) -> _Evidence:
        return _Evidence(*(column[first:stop] for column in vars(self).values()))

    def join(self, other: _Evidence) -> _Evidence:
        return _Evidence(*map(np.concatenate, zip(vars(self).values(), vars(other).values(), strict=True)))


class TopicCheck:
    """Judges the messages of a topic, partition by partition.

    Args:
        config: config of the stream.
        partitions: number of partitions of the topic.
    """

    def __init__(self, config: StreamConfig, partitions: int) -> None:
        self._config = config
        self._window = WINDOW[config.format]
        self._start: dict[int, int] = {}
        self._latest: dict[int, _Evidence] = {}
        self._examples: dict[tuple[int, bool], tuple[int, str]] = {}
        # Weights of a misplaced user and of one in its place in the logarithm of the likelihood ratio.
        self._against = math.log((1 - 1 / partitions) / _FEW_MISPLACED) if partitions > 1 else 0.0
        self._for = math.log((1 - _FEW_MISPLACED) * partitions)

    def ranges(
        self, position: Mapping[int, int], held: Mapping[int, tuple[int, int]], resumed: bool
    ) -> dict[int, tuple[int, int]]:
        """Return for each partition the range of offsets to add first, for a reader that starts at ``position``.

        Args:
            position: first offset to read of each partition.
            held: offset of the first message of each partition, and offset after its last message.
            resumed: an earlier reader has come to this position.
        """
        self._start = dict(position)
        back = self._window if resumed else 0
        first = {p: max(held[p][0], at - back) for p, at in position.items()}
        return {p: (at, min(held[p][1], at + self._window)) for p, at in first.items()}

    def add(self, partition: np.ndarray, offset: np.ndarray, decoded: DecodedMessages) -> None:
        """Judge the next messages of some partitions; messages that were added before are ignored.

        Args:
            partition: ``[messages]`` ascending.
            offset: ``[messages]``, ascending within a partition.
            decoded: content of these messages.

        Raises:
            UserError: the topic does not fit the settings.
        """
        evidence = _evidence_of(offset, decoded)
        for bad in reversed(decoded.rejected):
            at = bad.message
            self._examples[int(partition[at]), bad.user is not None] = int(offset[at]), bad.reason
        edges = [0, *(np.flatnonzero(np.diff(partition)) + 1).tolist(), len(partition)]
        for first, stop in pairwise(edges):
            p = int(partition[first])
            known = self._latest.get(p)
            if known is not None and len(known):
                first += int(np.searchsorted(offset[first:stop], known.offset[-1], "right"))
            self._add(p, evidence.part(first, stop))

    def _add(self, p: int, new: _Evidence) -> None:
        """Judge the next messages of a partition."""
        latest = self._latest.get(p, new.part(0, 0))
        suspicious = (new.misplaced | new.rejected).any()
        # A window is judged once it is full, or with all the messages that there are.
        filled = latest.join(new.part(0, max(0, self._window - len(latest))))
        if suspicious and len(filled) > len(latest):
            self._judge(p, filled)
        if suspicious and len(filled) == self._window:
            self._slide(p, filled, new.part(len(filled) - len(latest)))
        self._latest[p] = latest.join(new).part(-self._window)

    def _judge(self, p: int, window: _Evidence) -> None:
        """Judge one window."""
        # Earlier messages are evidence about later ones only: an earlier reader has gone on after them.
        if window.offset[-1] < self._start.get(p, 0):
            return
        misplaced = np.unique(window.user[window.misplaced])
        right = np.unique(window.user[~window.misplaced & (window.user != _NO_USER)])
        if len(misplaced) * self._against - len(right) * self._for >= _CERTAINTY:
            self._refuse_partitioner(p, len(misplaced), len(misplaced) + len(right), window)
        rejected = int(window.rejected.sum())
        if 2 * rejected > len(window) >= self._window // 4:
            self._refuse_most(p, rejected, window)

    def _slide(self, p: int, window: _Evidence, new: _Evidence) -> None:
        """Judge the windows that end with each bad one of the new messages, from a full window on."""
        everything = window.join(new)
        users, misplaced = everything.user.tolist(), everything.misplaced.tolist()
        counts: dict[bool, Counter[int]] = {
            flag: Counter(window.user[(window.misplaced == flag) & (window.user != _NO_USER)].tolist())
            for flag in (False, True)
        }
        rejected = np.concatenate([[0], np.cumsum(everything.rejected)])
        rejected = (rejected[self._window :] - rejected[: -self._window]).tolist()
        bad = (everything.misplaced | everything.rejected).tolist()
        for old in range(len(new)):
            at = old + self._window
            for place, change in ((old, -1), (at, 1)):
                if users[place] != _NO_USER:
                    counted = counts[misplaced[place]]
                    counted[users[place]] += change
                    if not counted[users[place]]:
                        del counted[users[place]]
            if bad[at] and (
                2 * rejected[old + 1] > self._window
                or len(counts[True]) * self._against - len(counts[False]) * self._for >= _CERTAINTY
            ):
                self._judge(p, everything.part(old + 1, at + 1))

    def _example(self, p: int, misplaced: bool) -> str:
        offset, reason = self._examples.get((p, misplaced)) or self._examples[p, not misplaced]
        return f"offset {offset:,}: {reason}"

    def _refuse_partitioner(self, p: int, misplaced: int, users: int, window: _Evidence) -> NoReturn:
        raise UserError(
            f"topic {self._config.topic} partition {p}: {misplaced:,} of the {users:,} users at offsets "
            f"{_span(window)} belong to other partitions (such as {self._example(p, True)}): the topic has another "
            f'partitioner; set stream.partitioner = "producer" if its producer keeps every user in one partition'
        )

    def _refuse_most(self, p: int, rejected: int, window: _Evidence) -> NoReturn:
        raise UserError(
            f"topic {self._config.topic} partition {p}: {rejected:,} of the {len(window):,} messages at offsets "
            f"{_span(window)} were rejected (such as {self._example(p, False)}); check that stream.format = "
            f"{self._config.format!r} and stream.partitioner = {self._config.partitioner!r} are those of the topic"
        )


def _span(window: _Evidence) -> str:
    """Return the offsets of a window as text."""
    return f"{window.offset[0]:,} to {window.offset[-1]:,}"


def _evidence_of(offset: np.ndarray, decoded: DecodedMessages) -> _Evidence:
    """Return the evidence of decoded messages."""
    messages = len(offset)
    user, misplaced = np.full(messages, _NO_USER), np.zeros(messages, bool)
    # The first event stands for its message, whether it is in its place or not, so that neither is preferred.
    earliest = np.full(messages, np.iinfo(np.int64).max)
    owner, first = np.unique(decoded.message, return_index=True)
    user[owner], earliest[owner] = decoded.events["user_id"][first], decoded.inside[first]
    rejected = np.zeros(messages, np.int64)
    for bad in decoded.rejected:
        rejected[bad.message] += 1
        if bad.user is not None and bad.inside < earliest[bad.message]:
            earliest[bad.message] = bad.inside
            user[bad.message], misplaced[bad.message] = bad.user, True
    return _Evidence(offset, user, misplaced, 2 * rejected > decoded.sizes)
