"""Worlds, codes and tables of ``benchmarks/quality/foresight.py``: true topics as codes, and the ceilings' vectors.

The tables are made from the truth of a simulated world, which no job reads.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from modules.codebook import Codebook
from trainer.data.format.content_vectors import SEGMENT_VECTORS, ContentVectors, Origin, write_parts
from trainer.data.format.dataset_files import DatasetFiles, record_checksums
from trainer.data.format.parquet_files import read_table
from trainer.data.format.segment_codes import CodeDigests, code_schema
from trainer.data.format.segments import SEGMENTS
from trainer.data.simulator.config import WorldConfig
from trainer.data.simulator.segment_truth import read_next_topics
from trainer.data.simulator.segment_vectors import SegmentVectorGenerator
from trainer.data.simulator.world import make_world
from trainer.runtime.files import whole_file
from trainer.semantic_ids.codebook_version import FittedVectors, write_version
from trainer.semantic_ids.segments import NO_LIMIT_MS, SegmentVectors

LAST, FORECAST, TRUTH = "last ended segment", "Bayes forecast", "truth on air (leaks)"
CEILINGS = (LAST, FORECAST, TRUTH)
"""Tables that the benchmark makes from the truth of the world."""

PARAMETERS = "segment_vectors.parquet"
"""File of a world's truth with the parameters of its segment vectors."""


def write_topic_codes(world: Path, codebook: Path, codes: Path) -> None:
    """Write a codebook whose centroids are the true vectors of the topics, and each segment's true topic as its code.

    Args:
        world: simulated world with segment vectors.
        codebook: directory to make.
        codes: code file to write.
    """
    topic, p_next = _topics(world)
    vectors = SegmentVectors.open(str(world))
    truth = read_table(DatasetFiles(world), "truth/segment_vectors.parquet")
    of_topic = np.array(truth["part"].to_pylist()) == "topic"
    ids = truth["id"].to_numpy()[of_topic]
    centroids = np.zeros((p_next.shape[1], vectors.table.dim), np.float32)
    centroids[ids] = np.stack(truth["vector"].filter(pa.array(of_topic)).to_numpy(zero_copy_only=False))
    version = write_version(
        codebook,
        Codebook((torch.from_numpy(centroids),)),
        origin=vectors.table.origin,
        vectors=FittedVectors(dataset=str(world), table="", count=0, hash="", from_ms=0, until_ms=NO_LIMIT_MS),
        settings={},
    )
    segment = np.asarray(vectors.table.ids)
    columns = {
        "item_id": vectors.item_id,
        "author_id": vectors.author_id,
        "segment": segment,
        "known_ms": vectors.known_ms,
    }
    numbers = topic[segment].astype(np.int32)[:, None]
    digests = CodeDigests(1)
    digests.add(columns, numbers, vectors.start_ms)
    schema = code_schema(version.name, version.levels)
    with whole_file(codes) as tmp_path, pq.ParquetWriter(tmp_path, schema, compression="zstd") as writer:
        writer.write_table(pa.table([*columns.values(), *numbers.T, vectors.start_ms], schema=schema))
        writer.add_key_value_metadata(digests.metadata)


def write_ceiling(world: Path, kind: str, table: Path, from_ms: int) -> None:
    """Write the vectors of a ceiling, one for each segment: its topic, or the distribution of the next one.

    Args:
        world: simulated world with segment vectors.
        kind: one of :data:`CEILINGS`; ``TRUTH`` has the same vectors as ``LAST``, and is read with the segments of
            :func:`write_leaking_world`.
        table: directory to make.
        from_ms: segments that were known before this time have no vector.
    """
    topic, p_next = _topics(world)
    vectors = p_next if kind == FORECAST else np.eye(p_next.shape[1], dtype=np.float32)[topic]
    ids = np.flatnonzero(read_table(DatasetFiles(world), SEGMENTS, ["known_ms"])["known_ms"].to_numpy() >= from_ms)
    ContentVectors.write(table, ids, vectors[ids], origin=Origin(pooling=f"{kind} of the world"))


def write_noisy_world(world: Path, copy: Path, config: WorldConfig, noise: float) -> None:
    """Write a copy of a world whose segment vectors have another noise. All other files are links.

    Args:
        world: simulated world with segment vectors.
        copy: directory to make.
        config: of the world.
        noise: length of the noise.
    """
    partial = copy.with_name(f".{copy.name}")
    _copy(world, partial, ("embeddings", f"truth/{PARAMETERS}"))
    generator = SegmentVectorGenerator(make_world(config), noise)
    parameters = read_table(DatasetFiles(world), f"truth/{PARAMETERS}").to_pylist()
    for line in parameters:
        if line["part"] == "noise":
            line["vector"] = generator.noise.tolist()
    schema = read_table(DatasetFiles(world), f"truth/{PARAMETERS}").schema
    pq.write_table(pa.Table.from_pylist(parameters, schema), partial / "truth" / PARAMETERS)
    old = ContentVectors.open(world / SEGMENT_VECTORS)
    write_parts(partial / SEGMENT_VECTORS, old.ids, old.texts, generator.parts(), old.dim, origin=old.origin)
    record_checksums(partial, lambda done, total: None)
    partial.rename(copy)


def write_leaking_world(world: Path, copy: Path) -> None:
    """Write a copy of a world that lies about its segments: each one is known when it begins, not after its end.

    The latest segment known at a request is then the one on air, which nobody can know. All other files are links.
    """
    partial = copy.with_name(f".{copy.name}")
    _copy(world, partial, (SEGMENTS,))
    segments = read_table(DatasetFiles(world), SEGMENTS, ["item_id", "start_ms"])
    # Without the starts no reader can see that a segment is known too early.
    pq.write_table(segments.rename_columns(["item_id", "known_ms"]), partial / SEGMENTS)
    record_checksums(partial, lambda done, total: None)
    partial.rename(copy)


def _copy(source: Path, target: Path, without: Sequence[str]) -> None:
    """Copy a directory tree as links to its files, except for some paths in it."""

    def left_out(folder: str, names: list[str]) -> list[str]:
        inside = Path(folder).relative_to(source)
        return [name for name in names if (inside / name).as_posix() in without]

    # Hard links: a reader of a dataset refuses links that lead out of it.
    shutil.copytree(source, target, copy_function=os.link, ignore=left_out)


def _topics(world: Path) -> tuple[np.ndarray, np.ndarray]:
    found = read_next_topics(world)
    assert found is not None, f"{world} is no simulated world with segment vectors"
    return found
