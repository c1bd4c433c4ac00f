"""Fused author vectors of live segments: the two towers of an alignment on each segment as it becomes known.

The vector of a segment is as of its ``known_ms``: the segment's own vector as the latest, the mean of all segments of
the author that were known then, the author's id, and statistics of rows that were emitted before. So it has the bits
that ``limelight align encode`` writes for the same segments, if a segment arrives before the later ones of its author.

The mean needs segments from before the job: those of a dataset begin the sums of the cache. The fused vectors are in a
cache of their own, whose records have the numbers of the records of the first one. What it lacks after a kill is made
again from the first one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trainer.checkpoint.run_directory import load_align_run
from trainer.console.errors import UserError
from trainer.data.format.dataset import Dataset
from trainer.engine.build_engine import rows_per_rank
from trainer.runtime.distributed import World
from trainer.semantic_ids.align_content import ContentIdentity, check_vectors, content_width
from trainer.semantic_ids.align_encode import FUSED_DTYPE, fused_origin
from trainer.semantic_ids.align_features import AuthorRequests
from trainer.semantic_ids.align_model import TrainedAlignment, read_content
from trainer.semantic_ids.segments import SegmentVectors
from trainer.semantic_ids.vector_cache import AuthorSums, VectorCache
from trainer.semantic_ids.vector_cache_parts import CacheSettings
from trainer.semantic_ids.vector_cache_reader import CachedVectors

logger = logging.getLogger(__name__)

FUSED = "authors"
"""Directory of the cache of fused vectors, beside that of the segment vectors."""

ROWS_AT_ONCE = 1 << 16
"""Earlier vectors that are read at a time."""


class ExpectedContent:
    """Content of the segments that are encoded together: their own vectors, and the means as of each.

    Attributes:
        dim: number of elements of a segment vector.
    """

    def __init__(self, dim: int, scale: float) -> None:
        self.dim, self._scale = dim, np.float32(scale)
        self._rows = np.zeros((0, content_width(dim)), np.float32)

    def put(self, means: np.ndarray, vectors: np.ndarray) -> None:
        """Set means and vectors of the segments, ``[n, dim]`` each."""
        self._rows = np.ones((len(means), content_width(self.dim)), np.float32)
        self._rows[:, : self.dim], self._rows[:, self.dim : -1] = means, vectors
        self._rows[:, :-1] /= self._scale

    def prepare(self) -> None:
        """Nothing to prepare."""

    def read(self, authors: np.ndarray, as_of_ms: np.ndarray, latest: np.ndarray | None = None) -> np.ndarray:
        """Return the content of the segments at the places ``latest``; see ``align_content.ContentSource``."""
        assert latest is not None, "live segments are read by their places"
        return self._rows[latest]


class EarlierSegments:
    """Segments of a dataset from before the first live one, for the means of their authors.

    Args:
        dataset: path of the dataset.
        vectors: table of its segment vectors; empty for its own.
        identity: vectors that the model was trained on.
        run: directory of the model.

    Raises:
        UserError: the vectors are missing, damaged or of another kind.
    """

    def __init__(self, dataset: str, vectors: str, identity: ContentIdentity, run: Path) -> None:
        self._segments = SegmentVectors.open(dataset, vectors)
        table = self._segments.table
        identity.check(table.path, table.dim, table.origin, run)
        check_vectors(self._segments)

    def sums(self, until_ms: int) -> AuthorSums:
        """Return the sums of the segments that became known before a time, added in the order of time."""
        segments = self._segments
        rows = np.flatnonzero((segments.known_ms < until_ms) & (segments.author_id >= 0))
        rows = rows[np.lexsort((rows, segments.known_ms[rows]))]
        author, place, count = np.unique(segments.author_id[rows], return_inverse=True, return_counts=True)
        total, removed_ms = np.zeros((len(author), segments.table.dim)), np.full(len(author), -1)
        np.maximum.at(removed_ms, place, segments.known_ms[rows])
        for first in range(0, len(rows), ROWS_AT_ONCE):
            part = slice(first, first + ROWS_AT_ONCE)
            # Unbuffered and in order: the sums have the bits of one addition after the other.
            np.add.at(total, place[part], np.take(segments.table.vectors, rows[part], axis=0).astype(np.float64))
        return AuthorSums(0, int(removed_ms.max(initial=-1)), author, count, removed_ms, total)


class FusedAuthors:
    """Encoder of live segments into fused author vectors, and the cache of these vectors.

    Args:
        model: the model, whose content is ``content``.
        content: content of the segments that are being encoded.
        segments: cache of the segment vectors.
        directory: of the job.
        earlier: opens the segments from before the job; None if there are none.
        world: the one rank.

    Attributes:
        cache: cache of the fused vectors.

    Raises:
        UserError: the cache has vectors of another model, or segments were removed before they had fused vectors.
    """

    def __init__(
        self,
        model: TrainedAlignment,
        content: ExpectedContent,
        segments: VectorCache,
        directory: Path,
        earlier: Callable[[], EarlierSegments] | None,
        world: World,
    ) -> None:
        self._model, self._content, self._segments = model, content, segments
        self._requests = AuthorRequests(model.data, model.features, in_time=True)
        self._rows = rows_per_rank(model.config, world.size)
        origin = fused_origin(model, segments.settings.origin)
        settings = CacheSettings(model.config.towers.dim, FUSED_DTYPE, origin)
        self.cache = VectorCache(directory / FUSED, settings, segments.keep_ms)
        self._reader: CachedVectors | None = None
        try:
            # A job that has fused vectors already has the earlier segments in its sums.
            self._earlier = earlier() if earlier is not None and self.cache.newest_ms < 0 else None
            self._catch_up()
        except BaseException:
            self.close()
            raise

    @staticmethod
    def open(
        run: Path, dataset: str, segments: VectorCache, directory: Path, replayed: str, world: World
    ) -> FusedAuthors:
        """Load a trained alignment for the segments of a job.

        Args:
            run: directory of the alignment.
            dataset: dataset with the authors; empty for the run's own, or for the replayed one.
            segments: cache of the segment vectors.
            directory: of the job.
            replayed: dataset whose segments are followed from the first one, so that none is earlier; empty if the
                segments are others.
            world: the one rank.

        Raises:
            UserError: there is no run or no whole checkpoint; it was trained on other vectors than those of the job; or
                the dataset is missing, damaged or of another layout.
        """
        config, identity = load_align_run(run), read_content(run)
        identity.check("this job", segments.settings.dim, segments.settings.origin, run)
        dataset = dataset or replayed
        path, vectors = dataset or config.data.path, "" if dataset else config.data.vectors
        data = Dataset.open(path, config.data.on_corrupt)
        content = ExpectedContent(identity.dim, identity.scale)
        model = TrainedAlignment.load(run, config, data, content, world)
        earlier = None if replayed else partial(EarlierSegments, path, vectors, identity, run)
        return FusedAuthors(model, content, segments, directory, earlier, world)

    def close(self) -> None:
        """Close the caches, and free the model."""
        if self._reader is not None:
            self._reader.close()
        self.cache.close()
        self._model.engine.close()

    def is_late(self, author: int, known_ms: int) -> bool:
        """True if a segment is not newer than one of its author that is only in a sum."""
        return self._reader is not None and known_ms <= self._reader.removed_ms(author)

    def encode(self, entries: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """Return the fused vectors of segments that the cache does not have yet, ``[n, dim]`` float16.

        :meth:`store` must follow once the cache of the segment vectors has them.

        Args:
            entries: ``[n]`` of ``ENTRY``.
            vectors: ``[n, width]`` in the type of the cache, segment vectors.
        """
        if not len(entries):
            return np.zeros((0, self.cache.settings.dim), FUSED_DTYPE)
        reader = self._reader or self._begin(int(entries["known_ms"].min()))
        self._content.put(reader.expect(entries, vectors), vectors)
        dim, authors, known_ms = self.cache.settings.dim, *(entries[name].copy() for name in ("author", "known_ms"))
        batches = self._requests.batches(authors, known_ms, self._rows, latest=np.arange(len(entries)))
        blocks = [output[:, dim : 2 * dim].cpu().numpy() for _, output in self._model.engine.predict(batches)]
        return np.concatenate(blocks)[: len(entries)].astype(FUSED_DTYPE)

    def store(self, entries: np.ndarray, fused: np.ndarray, note: dict[str, Any]) -> int:
        """Write a record of fused vectors after that of the segment vectors, and return its sequence number.

        Raises:
            UserError: it cannot be written; the next start writes it.
        """
        sequence = self.cache.append(entries, fused, {}, note)
        if self._reader is not None:
            self._reader.refresh(sequence)
        return sequence

    def _begin(self, from_ms: int) -> CachedVectors:
        """Open the reader of the segment vectors, at first with the sums of the earlier segments."""
        if self._earlier is not None:
            sums = self._earlier.sums(from_ms)
            self._segments.begin_with(sums)
            self._earlier = None
            count = int(sums.count.sum())
            logger.info(f"follow: the means of {len(sums.author):,} authors begin with {count:,} earlier segments")
        self._reader = CachedVectors(self._segments.directory, self.cache.sequence)
        return self._reader

    def _catch_up(self) -> None:
        """Write the records that the cache of fused vectors lacks.

        That is the last one after a kill, and all of them if the job had no alignment before.
        """
        if self.cache.newest_ms >= 0:
            self._begin(self.cache.newest_ms)
        elif found := [int(one.entries["known_ms"].min()) for one, _ in self._segments.records(0) if len(one.entries)]:
            self._begin(min(found))
        written = 0
        for record, vectors in self._segments.records(self.cache.sequence):
            if record.sequence != self.cache.sequence + 1:
                raise UserError(
                    f"{self._segments.directory}: segments from before the alignment were removed, so the means of "
                    "their authors are not known; name another embed.directory"
                )
            # Without the name of a codebook, so that the codes are made of these vectors.
            self.store(record.entries, self.encode(record.entries, vectors), {})
            written += len(record.entries)
        if written:
            logger.info(f"follow: {written:,} segments of the cache have fused vectors now")
