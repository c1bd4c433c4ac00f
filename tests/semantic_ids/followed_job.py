"""A job of the tests that follows a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tests.semantic_ids.follow_parts import DIM, NOW_MS, HashEncoder, ManualClock, SignCodebook, lines_of
from trainer.data.format.content_vectors import Origin
from trainer.semantic_ids.code_store import StoreSettings
from trainer.semantic_ids.follow import CodeTarget, Follower, FollowSettings, StopRequest
from trainer.semantic_ids.segment_source_lines import LineSource
from trainer.semantic_ids.store_address import open_store
from trainer.semantic_ids.vector_cache import VectorCache
from trainer.semantic_ids.vector_cache_parts import CacheSettings

SETTINGS = FollowSettings(
    batch=4, wait_seconds=0.5, behind_seconds=30.0, report_seconds=60.0, keep_ms=100 * 3_600_000, dtype="float32"
)
CACHE = CacheSettings(DIM, "float32", Origin(hash="test"))


class Job:
    """A job in a directory, which a test runs again and again.

    Attributes:
        followed: the last follower.
    """

    def __init__(self, folder: Path, messages: Sequence[Any] = ()) -> None:
        self.folder, self.lines = folder, folder / "in.jsonl"
        self.directory = folder / "follow"
        self.directory.mkdir(exist_ok=True)
        if messages:
            self.lines.write_bytes(lines_of(messages))
        self.clock = ManualClock()
        self.encoder = HashEncoder(self.clock)
        self.codebook = SignCodebook()
        self.stop = StopRequest()
        self.settings = SETTINGS

    @property
    def place(self) -> str:
        return str(self.folder / f"{self.codebook.name}.sqlite")

    @contextmanager
    def target(self) -> Iterator[CodeTarget]:
        store = open_store(self.place, StoreSettings(self.codebook.name))
        with closing(store):
            yield CodeTarget(self.codebook, store, self.place)

    def run(self, source: Any = None, target: Any = None) -> Follower:
        with VectorCache(self.directory / "cache", CACHE, self.settings.keep_ms) as cache, self.target() as own:
            source = source or LineSource(self.lines, cache.position, self.clock, until_end=True)
            arguments = (cache, target or own, self.settings, self.clock, self.stop)
            self.followed = Follower(self.directory, source, self.encoder, *arguments)
            self.followed.run()
        return self.followed

    def cached(self) -> dict[int, tuple[bytes, int, int]]:
        """Return vector, code and time of each segment in the cache."""
        with VectorCache(self.directory / "cache", CACHE, self.settings.keep_ms) as cache:
            found = [
                (entry["id"], (vector.tobytes(), int(entry["code"]), int(entry["known_ms"])))
                for record, vectors in cache.records(0)
                for entry, vector in zip(record.entries, vectors, strict=True)
            ]
        assert len({one for one, _ in found}) == len(found), "a segment is there twice"
        return {int(one): values for one, values in found}

    def runs(self) -> list[list[int]]:
        """Return all runs of the authors of the messages."""
        with self.target() as target:
            found = target.store.recent(np.arange(3), np.full(3, NOW_MS), 300)
        return [column.tolist() for column in (found.counts, found.code, found.length, found.first_ms, found.last_ms)]

    def dead_letters(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "dead-letters.jsonl").read_text().splitlines()]
