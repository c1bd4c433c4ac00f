"""Segments of a cache in tests, with vectors that follow from their ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.format.content_vectors import Origin
from trainer.semantic_ids.vector_cache import VectorCache
from trainer.semantic_ids.vector_cache_parts import ENTRY, CacheSettings

DIM = 3
SETTINGS = CacheSettings(DIM, "float32", Origin(model="m", hash="h"))
KEEP_MS = 1_000_000

Row = tuple[int, int, int, int]
"""Author, room, number of the segment, and known_ms."""


def entries_of(rows: Sequence[Row]) -> np.ndarray:
    entries = np.zeros(len(rows), ENTRY)
    for at, (author, room, segment, known_ms) in enumerate(rows):
        entries[at] = (room * 65_536 + segment, author, known_ms, 7, 5, 0)
    return entries


def vectors_of(entries: np.ndarray) -> np.ndarray:
    """Return a vector for each segment that only depends on its id."""
    return np.stack([np.random.default_rng(int(one)).standard_normal(DIM) for one in entries["id"]] or [np.zeros(DIM)])[
        : len(entries)
    ].astype(np.float32)


def append(cache: VectorCache, rows: Sequence[Row], position: dict[str, Any] | None = None) -> int:
    entries = entries_of(rows)
    return cache.append(entries, vectors_of(entries), position or {"file": [len(rows)]}, {"codebook": "v"})


def open_cache(path: Path, keep_ms: int = KEEP_MS) -> VectorCache:
    return VectorCache(path, SETTINGS, keep_ms)


def content(cache: VectorCache) -> list[tuple[int, bytes, bytes]]:
    return [(record.sequence, record.entries.tobytes(), vectors.tobytes()) for record, vectors in cache.records(0)]
