"""Small datasets of rooms with segment vectors, written without a simulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from modules.codebook import Codebook
from trainer.data.format.content_vectors import ContentVectors, Origin
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.segment_codes import CodeFile
from trainer.semantic_ids.code_files import assign_codes, read_codes
from trainer.semantic_ids.codebook_version import CodebookVersion, FittedVectors, write_version
from trainer.semantic_ids.segments import SegmentVectors, TimeRange

START_MS = 1_709_510_400_000
"""2024-03-04T00:00 UTC."""

SEGMENT_MS = 30_000
DIM = 8


def write_segments(path: Path, item_id: np.ndarray, known_ms: np.ndarray, authors: dict[int, int]) -> None:
    """Write a dataset's description, ``segments.parquet`` and ``items.parquet``."""
    path.mkdir(parents=True, exist_ok=True)
    spec = DatasetSpec("small", "test", "none", 1, "UTC", ("click",), {"click": ("live",)}, ("live",))
    (path / "dataset.json").write_text(spec.to_json())
    pq.write_table(pa.table({"item_id": item_id, "known_ms": known_ms}), path / "segments.parquet")
    items = {"item_id": np.array(list(authors)), "author_id": np.array(list(authors.values()))}
    pq.write_table(pa.table(items), path / "items.parquet")


def write_vectors(path: Path, vectors: np.ndarray, ids: np.ndarray | None = None, model: str = "abc") -> ContentVectors:
    """Write the table of segment vectors, by default one for each row of ``segments.parquet``."""
    ids = np.arange(len(vectors)) if ids is None else ids
    return ContentVectors.write(
        path / "embeddings/segments", ids, vectors, origin=Origin(model="small", hash=model), dtype="float32"
    )


def world_vectors(rooms: int, segments: int, seed: int = 0, dim: int = DIM) -> np.ndarray:
    """Draw vectors ``[rooms * segments, dim]``: a topic that stays for some segments, the room's style, and noise."""
    rng = np.random.default_rng(seed)
    topics, style = rng.standard_normal((6, dim)), 0.4 * rng.standard_normal((rooms, dim))
    topic = rng.integers(0, 6, (rooms, -(-segments // 4))).repeat(4, axis=1)[:, :segments]
    vectors = topics[topic] + style[:, None] + 0.1 * rng.standard_normal((rooms, segments, dim))
    return vectors.reshape(-1, dim).astype(np.float32)


def write_world(path: Path, rooms: int = 10, segments: int = 40, seed: int = 0) -> Path:
    """Write a dataset of rooms that are on air at the same time; room r is of author 100 + r // 2.

    Segment s of every room becomes known at ``START_MS + (s + 1) * SEGMENT_MS``.
    """
    item_id = np.repeat(np.arange(rooms), segments)
    known_ms = START_MS + (1 + np.tile(np.arange(segments), rooms)) * SEGMENT_MS
    write_segments(path, item_id, known_ms, {room: 100 + room // 2 for room in range(rooms)})
    write_vectors(path, world_vectors(rooms, segments, seed))
    return path


def make_version(path: Path, *sizes: int, dim: int = DIM, report: dict[str, Any] | None = None) -> CodebookVersion:
    """Write a version of random centroids, for vectors as :func:`write_vectors` writes them."""
    generator = torch.Generator().manual_seed(0)
    levels = tuple(torch.randn(size, dim, generator=generator) for size in sizes)
    fitted = FittedVectors(dataset="d", table="t", count=1, hash="", from_ms=0, until_ms=1)
    origin = Origin(model="small", hash="abc")
    return write_version(path, Codebook(levels), origin=origin, vectors=fitted, settings={}, report=report)


def assigned(version: CodebookVersion, world: Path, until_ms: int | None = None) -> CodeFile:
    """Write and read the codes of a dataset's segments, of those that were known before a time."""
    out = world / "codes.parquet"
    times = TimeRange() if until_ms is None else TimeRange(until_ms=until_ms)
    assign_codes(version, SegmentVectors.open(str(world)), times, out, quiet=True)
    return read_codes(out, version)
