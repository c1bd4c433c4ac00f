"""Authors whose rooms the same users met with the same behaviour under the same code, as of a time.

An author ``a`` has a count ``n_a(u, b, c)`` for each user, behaviour and code: the events ``b`` of ``u`` in segments of
``a`` with the code ``c``. Weights and the score of two authors are::

    w_a(u, b, c) = log(1 + n_a(u, b, c)) * log(A / A(u, b, c))
    score(a, a') = cos(w_a, w_a') * s / (s + SHRINKAGE)

``A`` is the number of authors with a known segment, ``A(u, b, c)`` that of the authors who have this user, behaviour
and code, and ``s`` the number of users with whom both have a behaviour and code in common. So popularity does not win:
the cosine is that of shares, not of counts; what many authors have in common weighs little; and one common user, which
two authors with hardly any viewers may have by chance, proves little.

Only events with ``time_ms <= as_of_ms`` in segments with ``known_ms <= as_of_ms`` are read. An event belongs to the
segment on air at its time, one at the very end of its visit to the segment that was watched longest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from trainer.console.errors import UserError
from trainer.data.features.segment_index import SegmentIndex
from trainer.data.format.segment_codes import CodeFile
from trainer.semantic_ids.code_interactions import visits_of
from trainer.stream.labels.event_log import EventLog

SHRINKAGE = 3.0
"""Number of common users at which the score is half of the cosine."""


class AuthorCells(NamedTuple):
    """Weights of authors for users, behaviours and codes of one partition, ``[n]`` each; all of a user's are there.

    Attributes:
        cell: int64, number of the user, behaviour and code, from 0 on.
        user: int64, number of the user, from 0 on.
        author: int64, place of the author.
        weight: float64, ``w``.
    """

    cell: np.ndarray
    user: np.ndarray
    author: np.ndarray
    weight: np.ndarray


class InteractionRanking(NamedTuple):
    """Ranked authors.

    Attributes:
        places: ``[r]`` int64.
        scores: ``[r]`` float64, above 0.
        users: ``[r]`` int64, common users.
        cells: ``[r]`` int64, common users, behaviours and codes.
    """

    places: np.ndarray
    scores: np.ndarray
    users: np.ndarray
    cells: np.ndarray


class CodedInteractions:
    """Events of a dataset in segments with a code, as of a time.

    Args:
        log: the event log.
        item_id, start_ms, known_ms: ``[n]`` int64, of the segments.
        author: ``[n]`` int64, place of each segment's author; -1 for one who is not compared.
        code: ``[n]`` int64, from 0 on.
        authors: number of authors.
    """

    def __init__(
        self,
        log: EventLog,
        item_id: np.ndarray,
        start_ms: np.ndarray,
        known_ms: np.ndarray,
        author: np.ndarray,
        code: np.ndarray,
        authors: int,
    ) -> None:
        self._log, self._author, self._code, self.authors = log, author, code, authors
        self._index = SegmentIndex(author, item_id, start_ms, known_ms)
        self._codes = int(code.max(initial=0)) + 1

    def cells(self, as_of_ms: int) -> Iterator[AuthorCells]:
        """Yield the weights of the users of each partition.

        Raises:
            UserError: a part of the event log cannot be read.
        """
        for partition in range(self._log.spec.partitions):
            events = self._log.read(partition)
            known = events["time_ms"] <= as_of_ms
            visits, done = visits_of({name: column[known] for name, column in events.items()})
            item = visits.item_id[done.visit]
            as_of = np.full(len(item), as_of_ms)
            place = self._index.on_air(item, done.time_ms, done.time_ms + 1, as_of, "entry")
            late = np.flatnonzero(done.at_exit)
            ends = visits.begin_ms[done.visit[late]], visits.end_ms[done.visit[late]]
            watched = self._index.on_air(item[late], *ends, as_of[late], "longest")
            place[late] = np.where(watched >= 0, watched, place[late])
            some = np.flatnonzero(place >= 0)
            some = some[self._author[place[some]] >= 0]
            users = np.unique(visits.user_id[done.visit[some]], return_inverse=True)[1]
            kind = done.behaviour[some] * self._codes + self._code[place[some]]
            kinds = self._codes * len(self._log.spec.behaviours)
            yield self._weigh(users * kinds + kind, kinds, self._author[place[some]])

    def _weigh(self, key: np.ndarray, kinds: int, author: np.ndarray) -> AuthorCells:
        """Count the events of each key and author, and return their weights."""
        keys, cell = np.unique(key, return_inverse=True)
        pairs, counts = np.unique(cell * self.authors + author, return_counts=True)
        cell, author = pairs // self.authors, pairs % self.authors
        sharing = np.bincount(cell, minlength=len(keys))[cell]
        return AuthorCells(cell, keys[cell] // kinds, author, np.log1p(counts) * np.log(self.authors / sharing))


def coded_interactions(
    log: EventLog, codes: CodeFile, start_ms: np.ndarray, authors: np.ndarray, level: int
) -> CodedInteractions:
    """Return the interactions under the codes of a file.

    Args:
        log: the event log.
        codes: the file.
        start_ms: ``[n]`` int64, start of each segment of the file.
        authors: ``[authors]`` int64, ids of the compared authors, ascending.
        level: number of levels of a code.

    Raises:
        UserError: the codes have fewer levels.
    """
    if level > len(codes.levels):
        raise UserError(
            f"--level {level}: the codes of {codes.path} have {len(codes.levels)}; 1 to {len(codes.levels)} is accepted"
        )
    number = np.unique(codes.codes[:, :level], axis=0, return_inverse=True)[1].reshape(-1)
    place = np.minimum(np.searchsorted(authors, codes.author_id), max(0, len(authors) - 1))
    author = np.where(authors[place] == codes.author_id, place, -1)
    return CodedInteractions(log, codes.item_id, start_ms, codes.known_ms, author, number, len(authors))


class AuthorSimilarity:
    """Sums of the score of one author with all others over partitions.

    Args:
        asked: place of the author.
        authors: number of authors.
    """

    def __init__(self, asked: int, authors: int) -> None:
        self._asked = asked
        self._product, self._squares = np.zeros(authors), np.zeros(authors)
        self._users, self._cells = np.zeros(authors, np.int64), np.zeros(authors, np.int64)

    def add(self, cells: AuthorCells) -> None:
        """Add the users of a partition."""
        count = len(self._squares)
        self._squares += np.bincount(cells.author, cells.weight**2, minlength=count)
        own = cells.author == self._asked
        weight = np.zeros(int(cells.cell.max(initial=-1)) + 1)
        asked = np.zeros(len(weight), bool)
        weight[cells.cell[own]], asked[cells.cell[own]] = cells.weight[own], True
        shared = np.flatnonzero(asked[cells.cell])
        author = cells.author[shared]
        self._product += np.bincount(author, cells.weight[shared] * weight[cells.cell[shared]], minlength=count)
        self._cells += np.bincount(author, minlength=count)
        # With counts it sorts, which is faster than a hash table of such keys.
        pairs, _ = np.unique(cells.user[shared] * count + author, return_counts=True)
        self._users += np.bincount(pairs % count, minlength=count)

    def scores(self) -> np.ndarray:
        """Return the score with each author, ``[authors]`` float64; 0 for the author itself, and without anything."""
        length = np.sqrt(self._squares * self._squares[self._asked])
        cosine = np.divide(self._product, length, out=np.zeros_like(length), where=length > 0)
        scores = cosine * self._users / (self._users + SHRINKAGE)
        scores[self._asked] = 0
        return scores

    def rank(self, authors: np.ndarray, allowed: np.ndarray, count: int) -> InteractionRanking:
        """Rank the other authors with a score above 0; equal ones by id.

        Args:
            authors: ``[authors]`` int64, ids.
            allowed: ``[authors]`` bool, authors that may be in the answer.
            count: largest number of ranked authors.
        """
        scores = self.scores()
        some = np.flatnonzero((scores > 0) & allowed)
        best = some[np.lexsort((authors[some], -scores[some]))[:count]]
        return InteractionRanking(best, scores[best], self._users[best], self._cells[best])
