"""Sources of segments of live rooms: the interface, and the parser of one message.

A message is a JSON object::

    {"item_id": 17, "author_id": 4, "segment": 3, "end_ms": 1709251290000, "text": "hello", "frames": ["17/3.jpg"]}

``item_id`` is the room, ``segment`` its number in the room from 0, and ``text`` the speech in it. The segment is known
at ``known_ms``; without it at ``end_ms``, else 30 seconds after ``start_ms``. Other keys are ignored. A message that
cannot be used is a :class:`RejectedMessage` with a reason; no message ends a job.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from trainer.data.format.text_schema import SEGMENT_MS, SEGMENTS_PER_ITEM

AHEAD_MS = 3_600_000
"""A segment that becomes known more than an hour after now has a wrong time, and would remove all others."""

MAX_ITEM = 1 << 47
MAX_TIME_MS = 1 << 45
MAX_FRAMES = 64
_MAX_INT64 = (1 << 63) - 1


@dataclass(frozen=True)
class LiveSegment:
    """Segment of a live room.

    Attributes:
        item_id: room.
        author_id: author of the room.
        segment: number of the segment in its room.
        known_ms: time from which it is known.
        text: speech, empty if there is none.
        frames: paths of frames, relative to ``follow.frames``.
        arrived_ms: clock time at which it could be read; in a replay the time when it was due.
        place: file and byte, or topic and offset, of its message.
    """

    item_id: int
    author_id: int
    segment: int
    known_ms: int
    text: str
    frames: tuple[str, ...] = ()
    arrived_ms: int = 0
    place: str = ""

    @property
    def id(self) -> int:
        """Id of the segment, as of ``text_schema.segment_ids``."""
        return self.item_id * SEGMENTS_PER_ITEM + self.segment


@dataclass(frozen=True)
class RejectedMessage:
    """Message that cannot be used.

    Attributes:
        place: file and byte, or topic and offset.
        reason: defect, and what would be accepted.
        content: the message.
    """

    place: str
    reason: str
    content: bytes


@dataclass
class SourceBatch:
    """Messages of a source, in its order.

    Attributes:
        position: position of the source after these messages, ready for JSON.
        segments: segments.
        rejected: messages that cannot be used.
    """

    position: dict[str, Any]
    segments: list[LiveSegment] = field(default_factory=list)
    rejected: list[RejectedMessage] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.segments or self.rejected)


class SegmentSource(Protocol):
    """Source of segments, opened at a position."""

    @property
    def finished(self) -> bool:
        """True if no further segment will come."""

    def take(self, limit: int, timeout: float) -> SourceBatch:
        """Return the next messages.

        Args:
            limit: number of segments after which the batch ends; a message of several segments is not divided.
            timeout: longest time to wait for the first message, in seconds.

        Raises:
            UserError: the source cannot be read any further.
        """

    def close(self) -> None:
        """Release the source's resources."""


class Clock:
    """Clock of this machine; tests have their own."""

    def time(self) -> float:
        """Return the seconds since 1970."""
        return time.time()

    def monotonic(self) -> float:
        """Return the seconds of a clock that is never set."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)


def parse_segment(content: bytes, now_ms: int, place: str) -> LiveSegment | RejectedMessage:
    """Return the segment of a message, or the reason why it cannot be used.

    Args:
        content: the message.
        now_ms: current time by the clock.
        place: place of the message.
    """
    try:
        return _segment(json.loads(content.decode()), now_ms, place)
    except _Unusable as error:
        reason = str(error)
    except UnicodeDecodeError:
        reason = "not UTF-8 text"
    except (ValueError, RecursionError, MemoryError):
        reason = "not valid JSON"
    return RejectedMessage(place, reason, content)


class _Unusable(Exception):
    """Reason why a message cannot be used."""


def _segment(value: Any, now_ms: int, place: str) -> LiveSegment:
    if not isinstance(value, dict):
        raise _Unusable(f"a {type(value).__name__}; a JSON object is expected")
    item_id = _integer(value, "item_id", MAX_ITEM - 1)
    author_id = _integer(value, "author_id", _MAX_INT64)
    segment = _integer(value, "segment", SEGMENTS_PER_ITEM - 1)
    start_ms, end_ms, known_ms = (
        None if value.get(key) is None else _integer(value, key, MAX_TIME_MS)
        for key in ("start_ms", "end_ms", "known_ms")
    )
    if end_ms is None and start_ms is not None:
        end_ms = start_ms + SEGMENT_MS
    if known_ms is None:
        known_ms = end_ms
    if known_ms is None:
        raise _Unusable("no time; known_ms, end_ms or start_ms is expected")
    if end_ms is not None and known_ms < end_ms:
        raise _Unusable(f"known_ms is {known_ms}, before the end of the segment ({end_ms})")
    if known_ms > now_ms + AHEAD_MS:
        raise _Unusable(f"known_ms is {known_ms}, more than an hour after now ({now_ms})")
    frames = value.get("frames") or []
    if not isinstance(frames, list) or len(frames) > MAX_FRAMES:
        raise _Unusable(f"frames must be a list of at most {MAX_FRAMES} paths")
    text = value.get("text", "" if frames else None)
    return LiveSegment(
        item_id,
        author_id,
        segment,
        known_ms,
        _text(text, "text"),
        tuple(_text(frame, "frames") for frame in frames),
        min(known_ms, now_ms),
        place,
    )


def _integer(value: dict[str, Any], key: str, largest: int) -> int:
    found = value.get(key)
    if type(found) is not int or not 0 <= found <= largest:
        what = "missing" if found is None else f"{found!a:.40}"
        raise _Unusable(f"{key} is {what}; a whole number from 0 to {largest} is expected")
    return found


def _text(found: Any, key: str) -> str:
    if not isinstance(found, str):
        raise _Unusable(f"{key} is {'missing' if found is None else f'{found!a:.40}'}; a text is expected")
    try:
        found.encode()
    except UnicodeEncodeError:
        raise _Unusable(f"{key} has half of a surrogate pair") from None
    return found
