"""Time-ordered statistics: the number of earlier impressions of a key, and of those with each behaviour.

A key is one or more of ``user``, ``author``, ``item`` and side features (``DatasetSpec.statistics``). Crosses are
exact: two different combinations never share a count. A row counts for other rows from its emission on: the statistics
of a row are over the rows with ``emit_ms < request_ms``, strictly, so they hold no information from after the request.

``Statistics`` goes through time in slices and serves each request as of its time; ``FrozenStatistics`` holds the counts
of one moment; ``StatisticsAsOf`` counts for a few requests, each as of its own time, from rows in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.data.format.id_index import IdIndex
from trainer.data.format.schema import DatasetSpec, Rows
from trainer.data.format.sorting import stable_order

_ID_COLUMNS = {"user": "user_id", "author": "author_id", "item": "item_id"}

# Counts of a chunk are added up in 16-bit lanes, four in a uint64, so a chunk must have fewer than 2^16 events. With
# half of that, the rows that a chunk writes stay in the processor's cache.
_LANES = 4
_CHUNK = (1 << 15) - 1


class Statistics:
    """Counts per key up to a moment that only moves forward. Memory grows with the distinct keys, not with the rows.

    Args:
        spec: description of the dataset, which lists the keys and the behaviours.
    """

    def __init__(self, spec: DatasetSpec) -> None:
        self._keys = _Keys(spec)
        self._width = 1 + len(spec.behaviours)
        self._counts = [_Counts(self._width) for _ in spec.statistics]
        self._pending = _Outcomes.of(spec, {}, self._keys)
        self._now: int | None = None
        self._spec = spec

    def advance(self, rows: Rows) -> np.ndarray:
        """Return the statistics of the next rows as of the request of each row, then add the rows to the counts.

        Args:
            rows: any number of rows sorted by ``request_ms``, none earlier than a row of a previous call. They need the
                columns of the keys, ``label``, ``mask``, ``request_ms`` and ``emit_ms``.

        Returns:
            ``[n, keys * (1 + behaviours)] float32``: for each key the number of earlier rows, then the number of those
            with each behaviour (masked labels do not count).

        Raises:
            ValueError: the rows are not in time order.
        """
        request = rows["request_ms"]
        n = len(request)
        out = np.zeros((n, len(self._counts), self._width), np.float32)
        if n == 0:
            return _flat(out)
        if (self._now is not None and request[0] < self._now) or np.any(request[1:] < request[:-1]):
            raise ValueError("statistics need rows in order of request_ms, none before those already seen")
        self._now = int(request[-1])

        new = _Outcomes.of(self._spec, rows, self._keys)
        known = _Outcomes.join(self._pending, new)
        # Outcomes emitted at or after the latest request wait for a later call.
        due = known.emit_ms < self._now
        self._pending = known.take(np.flatnonzero(~due))
        passed = np.flatnonzero(due)
        past = known.take(passed[stable_order(known.emit_ms[passed])])

        # Outcomes and requests form one sequence in time. An outcome comes before a request only if strictly earlier.
        outcome_at = np.arange(len(past.emit_ms)) + np.searchsorted(request, past.emit_ms, side="right")
        request_at = np.arange(n) + np.searchsorted(past.emit_ms, request, side="left")
        for first in range(0, len(outcome_at) + n, _CHUNK):
            o0, o1 = np.searchsorted(outcome_at, (first, first + _CHUNK))
            r0, r1 = np.searchsorted(request_at, (first, first + _CHUNK))
            self._chunk(
                past.slice(o0, o1),
                new.codes[:, r0:r1],
                outcome_at[o0:o1] - first,
                request_at[r0:r1] - first,
                out[r0:r1],
            )
        return _flat(out)

    def _chunk(
        self, past: _Outcomes, codes: np.ndarray, past_at: np.ndarray, asked_at: np.ndarray, out: np.ndarray
    ) -> None:
        """Process fewer than 2^16 outcomes and requests: write the statistics of the requests, and count the outcomes.

        Args:
            past: the outcomes.
            codes: codes of the requests, ``[keys, r]``.
            past_at: position of each outcome in the sequence in time.
            asked_at: position of each request in it.
            out: statistics of the requests, ``[r, keys, 1 + behaviours]`` float32; written.
        """
        size = len(past_at) + len(asked_at)
        weight = np.zeros((len(past.weight), size), np.uint64)
        weight[:, past_at] = past.weight
        row_at = np.full(size, -1, np.int64)
        row_at[asked_at] = np.arange(len(asked_at))
        at = np.concatenate([past_at, asked_at])
        result = _items(out)
        for key, counts in enumerate(self._counts):
            # Code and position in time are packed into one integer: one sort orders by code and then by time.
            sequence = np.concatenate([past.codes[key], codes[key]])
            sequence <<= 16
            sequence |= at
            sequence.sort()
            place = sequence & 0xFFFF
            code = sequence >> 16
            # First and last event of each key in the sorted sequence.
            head = np.flatnonzero(np.append(True, code[1:] != code[:-1]))
            last = np.append(head[1:], size) - 1
            row = np.take(row_at, place)
            asked = np.flatnonzero(row >= 0)
            total = np.empty((len(head), len(weight)), np.uint64)
            earlier = np.empty((len(asked), len(weight)), np.uint64)
            for lane in range(len(weight)):
                carried = np.take(weight[lane], place)
                summed = np.cumsum(carried)
                # Sums wrap around and overflow between lanes, but differences are exact: in each lane below 2^16.
                before = summed[head] - carried[head]
                total[:, lane] = summed[last] - before
                summed -= np.repeat(before, last - head + 1)
                earlier[:, lane] = np.take(summed, asked)
            counts.reserve(int(code[-1]) + 1)
            # Counts of earlier chunks, plus those of earlier events in this one.
            seen = np.take(counts.values, np.take(code, asked), axis=0)
            seen += _lanes(earlier, self._width)
            result[np.take(row, asked), key] = _items(seen.astype(np.float32))
            touched = np.flatnonzero(total[:, 0])
            counts.add(code[head[touched]], _lanes(total[touched], self._width))


class FrozenStatistics:
    """Counts per key at one moment, with lookups for any rows. The object can be pickled.

    Args:
        spec: description of the dataset, which lists the keys and the behaviours.
    """

    def __init__(self, spec: DatasetSpec) -> None:
        self._spec = spec
        self._keys = _Keys(spec)
        self._width = 1 + len(spec.behaviours)
        self._counts = [_Counts(self._width) for _ in spec.statistics]

    def add(self, rows: Rows) -> None:
        """Add rows to the counts, whatever their times; the caller selects the rows known at the moment."""
        past = _Outcomes.of(self._spec, rows, self._keys)
        for first in range(0, len(past.emit_ms), _CHUNK):
            part = past.slice(first, first + _CHUNK)
            for key, counts in enumerate(self._counts):
                order = stable_order(part.codes[key])
                code = part.codes[key][order]
                head = np.flatnonzero(np.append(True, code[1:] != code[:-1]))
                code = code[head]
                total = np.stack([np.add.reduceat(weight[order], head) for weight in part.weight], axis=1)
                counts.reserve(int(code[-1]) + 1)
                counts.add(code, _lanes(total, self._width))

    def lookup(self, rows: Rows, dtype: type[np.number] = np.float32) -> np.ndarray:
        """Return the counts of the rows' keys, ``[n, keys * (1 + behaviours)]``; zeros for unknown keys."""
        codes = self._keys.codes(rows, add=False)
        n = len(rows["user_id"])
        out = np.zeros((n, len(self._counts), self._width), dtype)
        for key, counts in enumerate(self._counts):
            known = np.flatnonzero((codes[key] >= 0) & (codes[key] < len(counts.values)))
            out[known, key] = counts.values[codes[key][known]]
        return _flat(out)


class StatisticsAsOf:
    """Counts per key for some requests, each as of its own time. Memory grows with the requests, not with the rows.

    Args:
        spec: description of the dataset, which lists the keys and the behaviours.
        requests: n rows with the columns of the keys and ``request_ms``, in any order.
    """

    def __init__(self, spec: DatasetSpec, requests: Rows) -> None:
        self._keys = _Keys(spec)
        self._width = 1 + len(spec.behaviours)
        self._times = np.unique(requests["request_ms"])
        self._requests = len(requests["request_ms"])
        rank = np.searchsorted(self._times, requests["request_ms"])
        # A point is a code and a time as one integer, so that the points of a code are consecutive and in time order.
        points = (
            np.unique(self._points(codes, rank), return_inverse=True) for codes in self._keys.codes(requests, add=True)
        )
        self._points_of: list[tuple[np.ndarray, np.ndarray]] = list(points)
        self._counts = [np.zeros((len(known), self._width), np.int64) for known, _ in self._points_of]

    def add(self, rows: Rows) -> None:
        """Add rows of any times; a row counts for the requests after its emission."""
        outcomes = np.ones((len(rows["emit_ms"]), self._width), np.int64)
        outcomes[:, 1:] = rows["label"] & rows["mask"]
        # Rank of the first request after the emission; behind the last one there is no point of the same code.
        rank = np.searchsorted(self._times, rows["emit_ms"], side="right")
        for codes, (known, _), counts in zip(
            self._keys.codes(rows, add=False), self._points_of, self._counts, strict=True
        ):
            place = np.searchsorted(known, self._points(codes, rank))
            counted = np.flatnonzero(place < len(known))
            counted = counted[known[place[counted]] // self._span == codes[counted]]
            np.add.at(counts, place[counted], outcomes[counted])

    def lookup(self, dtype: type[np.number] = np.float32) -> np.ndarray:
        """Return the counts of the requests, ``[n, keys * (1 + behaviours)]``."""
        parts = []
        for (known, request), counts in zip(self._points_of, self._counts, strict=True):
            total = np.cumsum(counts, axis=0)
            head = np.searchsorted(known, known // self._span * self._span)
            parts.append((total - total[head] + counts[head])[request])
        return _flat(np.stack(parts, axis=1).astype(dtype)) if parts else np.zeros((self._requests, 0), dtype)

    @property
    def _span(self) -> int:
        """Number of ranks of a code, with one behind the last request."""
        return len(self._times) + 1

    def _points(self, codes: np.ndarray, rank: np.ndarray) -> np.ndarray:
        return codes * self._span + rank


def smoothed_rates(counts: np.ndarray, prior: np.ndarray, strength: float | np.ndarray) -> np.ndarray:
    """Return features from counts: logits of smoothed behaviour rates, and logarithms of the numbers of rows.

    Args:
        counts: ``[n, keys * (1 + behaviours)]`` as returned by ``Statistics``.
        prior: ``[behaviours]``, base rate p0 of each behaviour, strictly between 0 and 1.
        strength: weight a of the prior as a number of rows, above 0; one number, or ``[behaviours]``.

    Returns:
        ``[n, keys * behaviours + keys] float32``: ``logit((positives + a p0) / (rows + a))`` per key and behaviour,
        then ``log(1 + rows)`` per key.

    Raises:
        ValueError: ``prior`` or ``strength`` is out of range.
    """
    prior, strength = np.asarray(prior, np.float32), np.asarray(strength, np.float32)
    if np.any(strength <= 0) or np.any(prior <= 0) or np.any(prior >= 1):
        raise ValueError("smoothed rates need a strength above 0 and priors strictly between 0 and 1")
    n = len(counts)
    keys = counts.shape[1] // (1 + len(prior))
    by_key = counts.reshape(n, keys, 1 + len(prior)).astype(np.float32, copy=False)
    shown, positives = by_key[:, :, :1], by_key[:, :, 1:]
    out = np.empty((n, keys * len(prior) + keys), np.float32)
    # The logit of a ratio of counts is a difference of logarithms, which stays precise for rates close to 0 or 1.
    logit = np.log(positives + strength * prior) - np.log(shown - positives + strength * (1 - prior))
    out[:, : keys * len(prior)] = _flat(logit)
    out[:, keys * len(prior) :] = np.log1p(shown[:, :, 0])
    return out


class _Keys:
    """Numbers the values of each key 0, 1, 2, ...

    A cross of several parts is numbered by a pair: the number of all its parts but the last, and that of the last.
    """

    def __init__(self, spec: DatasetSpec) -> None:
        self._keys = spec.statistics
        self._side = {side.name: column for column, side in enumerate(spec.side)}
        self._index: dict[tuple[str, ...], IdIndex] = {}

    def codes(self, rows: Rows, add: bool) -> np.ndarray:
        """Return the codes of the rows, ``[keys, n] int64``; new values are numbered if ``add`` is set, else -1."""
        if not rows:
            return np.empty((len(self._keys), 0), np.int64)
        done: dict[tuple[str, ...], np.ndarray] = {}
        codes = [self._codes(key, rows, add, done) for key in self._keys]
        return np.stack(codes) if codes else np.empty((0, len(rows["user_id"])), np.int64)

    def _codes(
        self, key: tuple[str, ...], rows: Rows, add: bool, done: dict[tuple[str, ...], np.ndarray]
    ) -> np.ndarray:
        """Return the codes of one key, ``[n] int64``; ``done`` keeps the codes that keys share as their parts."""
        if key in done:
            return done[key]
        if len(key) == 1 and key[0] in self._side:
            return rows["side"][:, self._side[key[0]]].astype(np.int64)
        if len(key) == 1:
            values, known = rows[_ID_COLUMNS[key[0]]], None
        else:
            # Numbers of parts are below 2^32, so a pair of them fits one int64 exactly: crosses never collide.
            first, last = (self._codes(part, rows, add, done) for part in (key[:-1], key[-1:]))
            values = (first << 32) | last
            known = (first >= 0) & (last >= 0)
        index = self._index.setdefault(key, IdIndex())
        done[key] = index.add(values) if add else index.find(values)
        if known is not None and not add:
            done[key] = np.where(known, done[key], -1)
        return done[key]


class _Counts:
    """A growing ``[codes, 1 + behaviours]`` table of counts."""

    def __init__(self, width: int) -> None:
        self.values = np.zeros((0, width), np.uint32)

    def reserve(self, codes: int) -> None:
        """Grow the table to at least ``codes`` rows."""
        if codes > len(self.values):
            grown = np.zeros((max(codes, 2 * len(self.values)), self.values.shape[1]), np.uint32)
            grown[: len(self.values)] = self.values
            self.values = grown

    def add(self, codes: np.ndarray, more: np.ndarray) -> None:
        """Add ``more``, ``[n, 1 + behaviours]``, to the counts of n distinct codes."""
        grown = np.take(self.values, codes, axis=0)
        grown += more
        _items(self.values)[codes] = _items(grown)


@dataclass(frozen=True)
class _Outcomes:
    """Outcomes of rows: the time from which they count, the codes for which they count, and the counts that they add.

    Attributes:
        emit_ms: ``[n]``.
        codes: ``[keys, n]``.
        weight: ``[words, n] uint64``: the number 1 and the labels, each in a lane of 16 bits.
    """

    emit_ms: np.ndarray
    codes: np.ndarray
    weight: np.ndarray

    @staticmethod
    def of(spec: DatasetSpec, rows: Rows, keys: _Keys) -> _Outcomes:
        """Return the outcomes of rows; no rows if ``rows`` is empty."""
        n = len(rows["emit_ms"]) if rows else 0
        words = -(-(1 + len(spec.behaviours)) // _LANES)
        lanes = np.zeros((n, words * _LANES), np.uint16)
        lanes[:, 0] = 1
        if rows:
            lanes[:, 1 : 1 + len(spec.behaviours)] = rows["label"] & rows["mask"]
        emit_ms = rows["emit_ms"] if rows else np.empty(0, np.int64)
        return _Outcomes(emit_ms, keys.codes(rows, add=True), np.ascontiguousarray(lanes.view(np.uint64).T))

    @staticmethod
    def join(first: _Outcomes, second: _Outcomes) -> _Outcomes:
        """Return the outcomes of ``first``, then those of ``second``."""
        return _Outcomes(
            np.concatenate([first.emit_ms, second.emit_ms]),
            np.concatenate([first.codes, second.codes], axis=1),
            np.concatenate([first.weight, second.weight], axis=1),
        )

    def take(self, order: np.ndarray) -> _Outcomes:
        """Return the outcomes at some positions."""
        return _Outcomes(
            np.take(self.emit_ms, order), np.take(self.codes, order, axis=1), np.take(self.weight, order, axis=1)
        )

    def slice(self, first: int, last: int) -> _Outcomes:
        """Return the outcomes ``[first, last)`` as views."""
        return _Outcomes(self.emit_ms[first:last], self.codes[:, first:last], self.weight[:, first:last])


def _lanes(words: np.ndarray, width: int) -> np.ndarray:
    """Split words into their 16-bit lanes, in order. ``[n, words] uint64 -> [n, width] uint16``."""
    return np.ascontiguousarray(words).astype("<u8", copy=False).view("<u2")[:, :width]


def _flat(values: np.ndarray) -> np.ndarray:
    """Flatten the last two axes, ``[n, a, b] -> [n, a * b]``, also if one of them is empty."""
    return values.reshape(len(values), values.shape[1] * values.shape[2])


def _items(values: np.ndarray) -> np.ndarray:
    """View the last axis as one opaque item, so that numpy moves it as a block; scattering is four times faster."""
    block = np.dtype((np.void, values.shape[-1] * values.itemsize))
    return values.view(block)[..., 0]
