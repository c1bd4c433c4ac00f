"""Opens source, codebook and store that the section ``[follow]`` names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from trainer.config.embed import EmbeddingJob, FollowConfig
from trainer.config.stream import StreamConfig
from trainer.console.outputs import local_path
from trainer.runtime.distributed import World
from trainer.semantic_ids.code_store import StoreSettings
from trainer.semantic_ids.codebook_version import CodebookVersion
from trainer.semantic_ids.follow import CodeTarget, FollowSettings
from trainer.semantic_ids.follow_align import FusedAuthors
from trainer.semantic_ids.redis_store import shown_address
from trainer.semantic_ids.segment_source import Clock, SegmentSource
from trainer.semantic_ids.segment_source_kafka import KafkaSegments
from trainer.semantic_ids.segment_source_lines import LineSource
from trainer.semantic_ids.segment_source_replay import ReplaySegments
from trainer.semantic_ids.store_address import open_store
from trainer.semantic_ids.vector_cache import VectorCache
from trainer.semantic_ids.vector_cache_parts import CacheSettings

HOUR_MS = 3_600_000


def follow_settings(config: EmbeddingJob) -> FollowSettings:
    """Return the settings of the loop."""
    follow = config.follow
    return FollowSettings(
        batch=follow.batch,
        wait_seconds=follow.wait_seconds,
        behind_seconds=follow.behind_seconds,
        report_seconds=follow.report_seconds,
        keep_ms=round(follow.keep_hours * HOUR_MS),
        dtype=config.embed.dtype,
        frames=bool(follow.frames),
    )


def open_segments(config: EmbeddingJob, position: Mapping[str, Any], clock: Clock) -> SegmentSource:
    """Open the source of segments at a position.

    Raises:
        UserError: it cannot be opened.
    """
    follow = config.follow
    if follow.source == "replay":
        return ReplaySegments(config.data.path, follow.replay_speed, position, clock)
    if follow.source == "kafka":
        return KafkaSegments(_stream(follow), position, clock)
    return LineSource(Path(follow.path), position, clock, until_end=follow.until_end)


@contextmanager
def open_fusion(
    config: EmbeddingJob, segments: VectorCache, directory: Path, world: World
) -> Iterator[FusedAuthors | None]:
    """Load the alignment of a job, and make the fused vectors that its cache lacks; yield None without one.

    Args:
        config: the job.
        segments: cache of the segment vectors.
        directory: of the job.
        world: the one rank.

    Raises:
        UserError: as :meth:`trainer.semantic_ids.follow_align.FusedAuthors.open`.
    """
    follow = config.follow
    if not follow.align:
        yield None
        return
    replayed = config.data.path if follow.source == "replay" else ""
    fusion = FusedAuthors.open(Path(follow.align), follow.align_data, segments, directory, replayed, world)
    with closing(fusion):
        yield fusion


@contextmanager
def open_codes(config: FollowConfig, vectors: CacheSettings) -> Iterator[CodeTarget | None]:
    """Open codebook and store; yield None without a codebook.

    Args:
        config: section ``[follow]``.
        vectors: width and origin of the vectors that have codes.

    Raises:
        UserError: one of them cannot be opened, or the store has codes of another version.
    """
    if not config.codebook:
        yield None
        return
    codebook = CodebookVersion.open(config.codebook)
    codebook.check_vectors("this job", vectors.dim, vectors.origin)
    codebook.check_numbers()
    place = config.store if "://" in config.store else str(local_path(config.store))
    store = open_store(place, StoreSettings(codebook.name), config.retry_seconds)
    try:
        yield CodeTarget(codebook, store, shown_address(place))
    finally:
        store.close()


def _stream(follow: FollowConfig) -> StreamConfig:
    names = ("brokers", "topic", "properties", "begin", "on_gap", "until_end", "retry_seconds")
    return StreamConfig(source="kafka", **{name: getattr(follow, name) for name in names})
