"""Tables of pre-trained vectors beside a dataset, for tests of whole jobs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data.format.content_vectors import ContentVectors
from trainer.data.format.dataset_files import record_checksums
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.segment_codes import CodeFile


def write_vectors_of(dataset: Path, codes: Path, path: Path) -> Path:
    """Write vectors of half of the items and of most segments of a code file, which become those of the dataset."""
    rng, segments = np.random.default_rng(6), CodeFile.read(codes)
    columns = {name: getattr(segments, name) for name in ("item_id", "start_ms", "known_ms")}
    pq.write_table(pa.table(columns), dataset / "segments.parquet")
    record_checksums(dataset, lambda done, total: None)
    items = np.arange(0, DatasetSpec.load(dataset).ids["item"].max, 2)
    rows = np.flatnonzero(rng.random(len(segments.known_ms)) < 0.9)
    for name, ids, width in (("items", items, 6), ("segments", rows, 5)):
        ContentVectors.write(path / name, ids, rng.standard_normal((len(ids), width)))
    return path


def vectors_beside(dataset: Path) -> tuple[str, ...]:
    """Return the settings that read the tables beside a dataset, which all tests of whole jobs use."""
    tables = dataset.parent / "vectors"
    return (
        f'features.content.title={{table="{tables / "items"}", dim=4, histories=true}}',
        f'features.content.air={{table="{tables / "segments"}", of="segment", dim=3, histories=true, reading="mean"}}',
    )
