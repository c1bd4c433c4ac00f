"""Follows live rooms: embeds each segment as it becomes known, and stores vector and code.

A batch is stored in this order: dead letters, the cache, with an alignment the cache of fused vectors, the store of
recent codes, the mark of what the store has.
The record of the cache has vectors, codes and the position of the source after them, and is there whole or not at all.
So a process that is killed continues after the last record: it reads no message twice and misses none. What the store
lacks is appended again from the cache; the store does not change by what it has already. So nothing is missing or
double after a kill at any point.

Codes are those of the segment vectors, or with an alignment those of the fused author vectors (``follow_align.py``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np

from trainer.console.errors import UserError, one_line
from trainer.data.format.content_vectors import Origin, finite_rows
from trainer.runtime.files import write_json
from trainer.runtime.preemption import Preempted
from trainer.runtime.stored_files import read_json_object
from trainer.semantic_ids.code_store import AppendCounts, CodeStore, SegmentCodes
from trainer.semantic_ids.follow_dead_letters import DeadLetterFile
from trainer.semantic_ids.follow_pace import Pace
from trainer.semantic_ids.follow_report import FollowReport
from trainer.semantic_ids.segment_source import Clock, LiveSegment, RejectedMessage, SegmentSource, SourceBatch
from trainer.semantic_ids.vector_cache import VectorCache
from trainer.semantic_ids.vector_cache_parts import ENTRY, CacheRecord

logger = logging.getLogger(__name__)

STORED = "stored.json"
"""File with the last record of the cache whose codes the store has."""
IDLE_SECONDS = 0.2


class SegmentEncoder(Protocol):
    """Encoder of segments into vectors."""

    def encode(self, texts: Sequence[str], frames: Sequence[Sequence[str]]) -> tuple[np.ndarray, list[str]]:
        """Encode segments.

        Args:
            texts: speech of each segment.
            frames: paths of the frames of each segment.

        Returns:
            Vectors ``[n, dim]`` float32, and a reason for each segment that has no vector, else an empty text.
        """


class SegmentCodebook(Protocol):
    """Version of a codebook."""

    @property
    def name(self) -> str:
        """Name of the version."""

    def encode(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return codes ``[n, levels]`` int32 of vectors ``[n, dim]``, and the squared errors ``[n]``."""

    def numbers(self, codes: np.ndarray) -> np.ndarray:
        """Return one number ``[n]`` int32 for each tuple of codes ``[n, levels]``."""

    def check_vectors(self, place: object, dim: int, origin: Origin) -> None:
        """Check that vectors are of the kind on which the version was fitted.

        Raises:
            UserError: they have another dimension, or another model makes them.
        """


class SegmentFusion(Protocol):
    """Encoder of segment vectors into fused author vectors, and the cache of these."""

    @property
    def cache(self) -> VectorCache:
        """Cache of the fused vectors, with a record for each of the cache of segment vectors."""

    def is_late(self, author: int, known_ms: int) -> bool:
        """True if no fused vector can be made of a segment, since later ones of its author are only in a sum."""

    def encode(self, entries: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """Return the fused vectors of segments that are about to be stored, ``[n, dim]`` in the type of ``cache``."""

    def store(self, entries: np.ndarray, fused: np.ndarray, note: dict[str, Any]) -> int:
        """Write a record of fused vectors, and return its number."""


@dataclass(frozen=True)
class CodeTarget:
    """Codebook and store of the codes.

    Attributes:
        codebook: version of the codebook.
        store: store of recent codes of this version.
        place: address of the store, without a password.
    """

    codebook: SegmentCodebook
    store: CodeStore
    place: str

    def codes(self, vectors: np.ndarray) -> np.ndarray:
        """Return the code of each vector ``[n]`` int32; the number of the tuple of a residual codebook."""
        return self.codebook.numbers(self.codebook.encode(vectors.astype(np.float32))[0])


class StopRequest:
    """Notes SIGTERM and ctrl-C, so that a batch is stored before the job ends. A second signal ends it at once.

    Attributes:
        signal: number of the signal that has arrived, 0 if none.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._waiting = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Note the signals of this process inside the context."""

        def note(number: int, frame: FrameType | None) -> None:
            again, self.signal = self.signal != 0, number
            if again or self._waiting:
                self.end()

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """End at once on a signal inside the context, which may wait for long."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def end(self) -> None:
        """End the job if a signal has arrived.

        Raises:
            KeyboardInterrupt: after ctrl-C.
            Preempted: after SIGTERM.
        """
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal:
            raise Preempted


@dataclass
class _Selected:
    """Segments of a batch that are embedded.

    Attributes:
        segments: these segments.
        rejected: messages that cannot be used.
        counts: numbers of the others by reason.
    """

    segments: list[LiveSegment] = field(default_factory=list)
    rejected: list[RejectedMessage] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class FollowSettings:
    """Settings of the loop; see the keys of ``[follow]``.

    Attributes:
        batch: largest number of segments that are embedded together.
        wait_seconds: longest time that a segment waits for others of its batch.
        behind_seconds: lag from which every second segment is dropped.
        report_seconds: time between two reports.
        keep_ms: time for which the cache keeps segments.
        dtype: type of the stored vectors.
        frames: True if frames are embedded; otherwise a segment without words is empty.
    """

    batch: int
    wait_seconds: float
    behind_seconds: float
    report_seconds: float
    keep_ms: int
    dtype: str
    frames: bool = False


class Follower:
    """Follows a source of segments until it ends or the job is asked to stop.

    Args:
        directory: directory of the job.
        source: source, opened at the position of the cache.
        encoder: makes the vectors.
        cache: cache of the vectors.
        target: codebook and store; None without codes.
        settings: settings of the loop.
        clock: clock.
        stop: tells if the job was asked to stop.
        fusion: makes the vectors that have codes; None for codes of the segment vectors.

    Raises:
        UserError: dead letters or reports cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        source: SegmentSource,
        encoder: SegmentEncoder,
        cache: VectorCache,
        target: CodeTarget | None,
        settings: FollowSettings,
        clock: Clock,
        stop: StopRequest,
        fusion: SegmentFusion | None = None,
    ) -> None:
        self._fusion = fusion
        # Cache of the vectors that have codes.
        self._coded = cache if fusion is None else fusion.cache
        self._directory, self._source, self._encoder, self._cache = directory, source, encoder, cache
        self._target, self._settings, self._clock, self._stop = target, settings, clock, stop
        self._dead_letters = DeadLetterFile(directory, _count_of(cache.note, "dead_letter_bytes"))
        counts = cache.note.get("counts")
        self.counts = Counter({name: _count_of(counts, name) for name in counts} if isinstance(counts, dict) else {})
        self._pace = Pace(settings.behind_seconds)
        self._report = FollowReport(directory, settings.report_seconds, clock.monotonic(), self.counts["embedded"])

    def run(self) -> None:
        """Embed and store segments until the source has ended or a signal has arrived.

        Raises:
            UserError: the source cannot be read, or cache or store cannot be written.
            KeyboardInterrupt, Preempted: a signal has arrived; all that was taken is stored.
        """
        try:
            self._append_missing()
            while not self._stop.signal:
                batch = self._take_unless_stopped()
                if batch is None:
                    break
                # The first position is stored in any case: a later start continues there, also if nothing has come.
                if batch or (batch.position and not self._cache.position):
                    self._store(batch)
                now = self._clock.monotonic()
                if self._report.is_due(now):
                    self._write_report(now)
                if not batch and self._source.finished:
                    break
            self._write_report(self._clock.monotonic())
            self._stop.end()
            total = ", ".join(f"{count:,} {name}" for name, count in sorted(self.counts.items()) if count)
            logger.info(f"follow: the source has ended; since the cache was made: {total or 'no segments'}")
        finally:
            self._report.close()

    def _take_unless_stopped(self) -> SourceBatch | None:
        """Take a batch; None if a signal has ended the wait for it. What was read then is read again later."""
        try:
            return self._take()
        except (KeyboardInterrupt, Preempted):
            if not self._stop.signal:
                raise
            return None

    def _take(self) -> SourceBatch:
        """Take segments until the batch is full or the first one has waited long enough."""
        # Brokers that do not answer may be waited for long.
        with self._stop.waiting():
            batch = self._source.take(self._settings.batch, IDLE_SECONDS)
        until = self._clock.monotonic() + self._settings.wait_seconds
        while batch and len(batch.segments) < self._settings.batch and not self._source.finished:
            left = until - self._clock.monotonic()
            if left <= 0 or self._stop.signal:
                break
            # Short waits, so that a signal is noticed.
            more = self._source.take(self._settings.batch - len(batch.segments), min(left, IDLE_SECONDS))
            batch.segments += more.segments
            batch.rejected += more.rejected
            batch.position = more.position
        return batch

    def _store(self, batch: SourceBatch) -> None:
        """Embed the segments of a batch, and store them in the order that the module describes."""
        began = self._clock.monotonic()
        chosen = self._select(batch)
        entries, vectors, fused = self._embed(chosen)
        counts = chosen.counts + Counter(embedded=len(entries), rejected=len(chosen.rejected))
        self._dead_letters.append(chosen.rejected)
        self.counts += counts
        note = {
            "codebook": None if self._target is None else self._target.codebook.name,
            "counts": {name: count for name, count in self.counts.items() if count},
            "dead_letter_bytes": self._dead_letters.size,
        }
        sequence = self._cache.append(entries, vectors, batch.position, note)
        if self._fusion is not None:
            sequence = self._fusion.store(entries, fused, {"codebook": note["codebook"]})
        counts["conflicting"] = self._append_codes(entries).conflicting
        self._mark(sequence)
        now, now_ms = self._clock.monotonic(), self._clock.time() * 1000
        lags = [max(0.0, (now_ms - segment.arrived_ms) / 1000) for segment in chosen.segments]
        self._report.add(counts, lags, [segment.item_id for segment in chosen.segments])
        if chosen.segments:
            self._pace.worked(now, now - began, len(chosen.segments))
            self._adapt(now, max(lags))

    def _select(self, batch: SourceBatch) -> _Selected:
        """Choose the segments to embed: new ones, and in time."""
        chosen = _Selected(rejected=list(batch.rejected))
        newest_ms, ids = self._cache.newest_ms, set()
        new = []
        for segment in batch.segments:
            if segment.id in ids or self._cache.has(segment.id):
                chosen.counts["repeated"] += 1
                continue
            new.append(segment.arrived_ms)
            if segment.known_ms < newest_ms - self._settings.keep_ms:
                # The parts of the cache with its time may be gone.
                chosen.counts["late"] += 1
            elif self._fusion is not None and self._fusion.is_late(segment.author_id, segment.known_ms):
                chosen.counts["late"] += 1
            elif not segment.text.strip() and not (segment.frames and self._settings.frames):
                chosen.counts["empty"] += 1
            elif not self._pace.takes(segment.segment):
                chosen.counts["dropped"] += 1
            else:
                ids.add(segment.id)
                newest_ms = max(newest_ms, segment.known_ms)
                chosen.segments.append(segment)
        self._pace.arrived(new)
        return chosen

    def _embed(self, chosen: _Selected) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return entries, vectors and vectors with codes of the chosen segments; those without a vector are rejected.

        The vectors with codes are the fused ones with an alignment, else the vectors themselves.
        """
        segments = chosen.segments
        if not segments:
            none = [np.zeros((0, cache.settings.dim), cache.settings.dtype) for cache in (self._cache, self._coded)]
            return np.zeros(0, ENTRY), none[0], none[1]
        vectors, reasons = self._encoder.encode(
            [segment.text for segment in segments], [segment.frames for segment in segments]
        )
        with np.errstate(over="ignore", invalid="ignore"):
            vectors = vectors.astype(self._settings.dtype)
        finite, nonzero = finite_rows(vectors, self._settings.dtype), (vectors != 0).any(axis=1)
        good = []
        for row, segment in enumerate(segments):
            reason = reasons[row] or ("" if finite[row] else f"its vector is not finite in {self._settings.dtype}")
            reason = reason or ("" if nonzero[row] else "its vector has only zeros")
            if reason:
                chosen.rejected.append(RejectedMessage(segment.place, reason, _content(segment)))
            else:
                good.append(row)
        vectors, segments = vectors[good], [segments[row] for row in good]
        chosen.segments = segments
        entries = np.zeros(len(good), ENTRY)
        for name, values in (
            ("id", [segment.id for segment in segments]),
            ("author", [segment.author_id for segment in segments]),
            ("known_ms", [segment.known_ms for segment in segments]),
            ("text", [text_hash(segment.text) for segment in segments]),
        ):
            entries[name] = values
        # Codes are of the vectors as they are stored, so that they can be made again from the cache.
        coded = vectors if self._fusion is None else self._fusion.encode(entries, vectors)
        entries["code"] = -1 if self._target is None or not good else self._target.codes(coded)
        return entries, vectors, coded

    def _append_codes(self, entries: np.ndarray) -> AppendCounts:
        """Append codes to the store."""
        if self._target is None or not len(entries):
            return AppendCounts(0, 0, 0, 0)
        codes = SegmentCodes(entries["author"], entries["id"], entries["code"], entries["known_ms"])
        # The cache has them, so a signal may end the job while the store does not answer.
        with self._stop.waiting():
            return self._target.store.append(codes)

    def _append_missing(self) -> None:
        """Append to the store what the cache has and the store may lack.

        That is what was not marked before a kill, and everything for another version or store. The latest segments are
        appended in any case: after a power failure, a store may lack calls that it had accepted. A store that lacks
        more gets everything.
        """
        if self._target is None:
            return
        after = min(self._stored(), self._coded.sequence_before_latest)
        added = self._append_samples(after)
        for record, vectors in self._coded.records(0 if added else after):
            self._stop.end()
            added += self._append_record(record, vectors)
        self._mark(self._coded.sequence)
        if added:
            logger.info(f"follow: {added:,} segments of the cache were appended to {self._target.place}")

    def _append_samples(self, after: int) -> int:
        """Append the oldest and the last record of those that the store should have, and return what it lacked of them.

        A store that was removed, emptied or restored from a backup has the address of the one that was marked.
        """
        added = 0
        for before in (0, after - 1) if after else ():
            for record, vectors in self._coded.records(before):
                if record.sequence > after:
                    break
                if len(record.entries):
                    added += self._append_record(record, vectors)
                    break
        return added

    def _append_record(self, record: CacheRecord, vectors: np.ndarray) -> int:
        """Append the codes of a record to the store, and return how many are new there."""
        assert self._target is not None
        entries = record.entries.copy()
        if record.note.get("codebook") != self._target.codebook.name and len(entries):
            entries["code"] = self._target.codes(vectors)
        return self._append_codes(entries).stored

    def _stored(self) -> int:
        """Return the last record whose codes the store has; 0 if the file is of another store or version."""
        assert self._target is not None
        file = self._directory / STORED
        try:
            document = read_json_object(file)
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({one_line(error)})") from None
        if (document.get("store"), document.get("codebook")) != (self._target.place, self._target.codebook.name):
            return 0
        return _count_of(document, "record")

    def _mark(self, sequence: int) -> None:
        """Note that the store has the codes up to a record."""
        if self._target is None:
            return
        document = {"record": sequence, "store": self._target.place, "codebook": self._target.codebook.name}
        try:
            write_json(self._directory / STORED, document)
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be written ({error.strerror})") from None

    def _adapt(self, now: float, lag_seconds: float) -> None:
        """Take every second segment if the model is too slow, and all again when it has caught up."""
        change = self._pace.update(now, lag_seconds)
        if change is None:
            return
        rates = f"{change.needed:,.1f} segments/s become known, the model reaches {change.reached:,.1f}"
        if change.halved:
            logger.warning(
                f"follow: the model is too slow for the rooms on air: {rates}, and the lag is {lag_seconds:,.1f} s; "
                "only every second segment of each room is embedded until it has caught up"
            )
        else:
            logger.info(f"follow: the model has caught up: {rates}; all segments are embedded again")

    def _write_report(self, now: float) -> None:
        self._report.write(now, self._pace.needed, self._pace.reached, self._pace.halved)


def text_hash(text: str) -> int:
    """Return the hash of a text that tables of vectors store."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _content(segment: LiveSegment) -> bytes:
    """Return a segment as a message."""
    names = ("item_id", "author_id", "segment", "known_ms", "text", "frames")
    return json.dumps({name: getattr(segment, name) for name in names}, ensure_ascii=False).encode()


def _count_of(values: dict[str, Any], name: str) -> int:
    """Return a number of a stored note, 0 if it is missing."""
    value = values.get(name, 0)
    return value if type(value) is int and value >= 0 else 0
