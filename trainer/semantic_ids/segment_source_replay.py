"""Source of segments: replays those of a dataset in the order in which they became known, at a chosen speed."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.data.format.text_schema import read_texts, segment_ids
from trainer.semantic_ids.segment_source import Clock, LiveSegment, SourceBatch

logger = logging.getLogger(__name__)

_KEY = "replay"


class ReplaySegments:
    """Source of the segments of a dataset; those of rooms that ``texts/items.parquet`` lacks have no author.

    Args:
        path: dataset, a directory or an fsspec URL.
        speed: 1 is real time, 60 plays an hour in a minute, 0 is as fast as possible.
        position: position to start from: ``replay`` -> ``[row, digest of the segments]``.
        clock: clock.

    Attributes:
        without_author: number of segments that are left out since their room has no author.

    Raises:
        UserError: the dataset has no segments or no rooms.
    """

    def __init__(self, path: str, speed: float, position: Mapping[str, Any], clock: Clock) -> None:
        segments = read_texts(path, "segments", ["item_id", "segment", "known_ms", "text"])
        items = read_texts(path, "items", ["item_id", "author_id"])
        item_id, segment = segments["item_id"].to_numpy(), segments["segment"].to_numpy()
        ids = segment_ids(item_id, segment)
        known_ms = segments["known_ms"].to_numpy()
        item, author = items["item_id"].to_numpy(), items["author_id"].to_numpy()
        order = np.argsort(item, kind="stable")
        at = np.minimum(np.searchsorted(item, item_id, sorter=order), max(len(item) - 1, 0))
        known = item[order[at]] == item_id if len(item) else np.zeros(len(item_id), bool)
        self.without_author = int((~known).sum())
        if self.without_author:
            logger.info(f"follow: {path}: {self.without_author:,} segments are left out, their rooms have no author")
        rows = np.flatnonzero(known)
        rows = rows[np.lexsort((ids[rows], known_ms[rows]))]
        self._item, self._segment, self._known_ms = item_id[rows], segment[rows], known_ms[rows]
        self._author = author[order[at[rows]]]
        self._text = segments["text"].cast(pa.large_string()).combine_chunks().take(pa.array(rows))
        self._digest = hashlib.blake2b(ids[rows].tobytes() + self._known_ms.tobytes(), digest_size=8).hexdigest()
        row, digest = position.get(_KEY, (0, self._digest))
        # Another dataset is replayed from its beginning.
        self._row = int(row) if digest == self._digest else 0
        self._speed, self._clock = speed, clock
        self._began = clock.time()
        self._anchor_ms = int(self._known_ms[min(self._row, len(self._known_ms) - 1)]) if len(self._known_ms) else 0

    @property
    def finished(self) -> bool:
        """True after the last segment."""
        return self._row >= len(self._known_ms)

    def take(self, limit: int, timeout: float) -> SourceBatch:
        """Return the segments that are due; see :class:`trainer.semantic_ids.segment_source.SegmentSource`."""
        until = self._clock.monotonic() + timeout
        while True:
            end = min(self._row + limit, self._due())
            left = until - self._clock.monotonic()
            if end > self._row or self.finished or left <= 0:
                break
            self._clock.sleep(min(left, max(0.001, self._time_of(self._row) - self._clock.time())))
        rows = range(self._row, end)
        texts = self._text.slice(self._row, len(rows)).to_pylist()
        batch = SourceBatch({_KEY: [end, self._digest]})
        for row, text in zip(rows, texts, strict=True):
            known_ms = int(self._known_ms[row])
            batch.segments.append(
                LiveSegment(
                    int(self._item[row]),
                    int(self._author[row]),
                    int(self._segment[row]),
                    known_ms,
                    text,
                    arrived_ms=round(1000 * self._time_of(row)),
                    place=f"segment {self._segment[row]} of room {self._item[row]}",
                )
            )
        self._row = end
        return batch

    def close(self) -> None:
        """Nothing to release."""

    def _due(self) -> int:
        """Return the number of segments that are due."""
        if not self._speed:
            return len(self._known_ms)
        # A thousandth of a millisecond more, since products of floats may fall below a whole millisecond.
        played_ms = self._anchor_ms + (self._clock.time() - self._began) * 1000 * self._speed + 1e-3
        return int(np.searchsorted(self._known_ms, played_ms, "right"))

    def _time_of(self, row: int) -> float:
        """Return the clock time at which a segment is due."""
        if not self._speed:
            return self._clock.time()
        return self._began + (int(self._known_ms[row]) - self._anchor_ms) / 1000 / self._speed
