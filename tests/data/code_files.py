"""Code files for tests, written without vectors and codebooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data.format.history import Histories
from trainer.data.format.schema import DOMAINS, DatasetSpec
from trainer.data.format.segment_codes import CodeDigests, CodeFile, code_schema
from trainer.data.format.text_schema import SEGMENT_MS

LEVELS = (5, 4, 3)
VERSION = "5x4x3-00000000"


def write_codes(path: Path, codes: CodeFile) -> Path:
    """Write a code file as ``limelight quantize assign`` does; without starts as an earlier version did."""
    schema = code_schema(codes.version, codes.levels)
    columns: dict[str, Any] = {name: getattr(codes, name) for name in ("item_id", "author_id", "segment", "known_ms")}
    digests = CodeDigests(len(codes.levels))
    digests.add(columns, codes.codes, codes.start_ms)
    metadata = {**schema.metadata, **{key.encode(): value.encode() for key, value in digests.metadata.items()}}
    arrays = [*columns.values(), *codes.codes.T, codes.start_ms]
    if codes.start_ms is None:
        schema, arrays = schema.remove(len(schema) - 1), arrays[:-1]
        metadata = {key: value for key, value in metadata.items() if not key.endswith(b"starts")}
    pq.write_table(pa.table(arrays, schema=schema).replace_schema_metadata(metadata), path)
    return path


def codes_around(visits: dict[str, np.ndarray], seed: int = 0, share: float = 0.5) -> CodeFile:
    """Return codes of four segments around a share of the live visits; some become known hours later.

    Author 7 has no rooms, and some rooms have no author.
    """
    rng = np.random.default_rng(seed)
    live = visits["domain"] == DOMAINS.index("live")
    chosen = np.flatnonzero(live & (rng.random(len(live)) < share))
    begin = visits["request_ms"][chosen] - rng.integers(0, SEGMENT_MS, len(chosen))
    start_ms = (begin[:, None] + np.arange(-1, 3) * SEGMENT_MS).reshape(-1)
    n, author_id = len(start_ms), np.repeat(visits["author_id"][chosen], 4)
    return CodeFile(
        Path(),
        VERSION,
        LEVELS,
        item_id=np.repeat(visits["item_id"][chosen], 4),
        author_id=np.where((author_id == 7) | (rng.random(n) < 0.05), -1, author_id),
        segment=np.arange(n),
        known_ms=start_ms + SEGMENT_MS + rng.integers(0, 4, n) * 3_600_000 * (rng.random(n) < 0.2),
        codes=rng.integers(0, LEVELS, (n, len(LEVELS))).astype(np.int32),
        start_ms=start_ms,
    )


def write_codes_of(dataset: Path, path: Path) -> Path:
    """Write codes of the rooms in the histories of a dataset."""
    histories = Histories(dataset, DatasetSpec.load(dataset))
    users, _ = histories.lengths()
    found = histories.latest(users, np.full(len(users), 1 << 60), domain=DOMAINS.index("live"), length=10_000)
    columns = {name: getattr(found, name) for name in ("item_id", "author_id", "request_ms", "domain")}
    return write_codes(path, codes_around(columns, share=0.9))


def codes_beside(dataset: Path) -> str:
    """Return the setting that reads the code file beside a dataset, which all tests of whole jobs use."""
    return f'features.codes.shown={{file="{dataset.parent / "codes.parquet"}", dim=8, prefix_rows=20}}'
