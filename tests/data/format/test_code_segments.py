"""Segments of a code file against those of a dataset with the same ids."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.semantic_ids.segment_world import START_MS, assigned, make_version, write_world
from trainer.config.features import CodesConfig, FeatureConfig
from trainer.console.errors import UserError
from trainer.data.features.content_tables import inside_dataset
from trainer.data.features.fitted_codes import check_dataset
from trainer.data.format.code_segments import has_segments, segments_of_codes
from trainer.data.format.segment_codes import CodeFile


@pytest.fixture
def world(tmp_path: Path) -> Path:
    path = write_world(tmp_path / "world", 4, 6)
    assigned(make_version(tmp_path / "book", 3), path)
    return path


def other_world(world: Path, name: str, add_ms: int) -> Path:
    """Return a dataset with the same ids of segments, whose segments become known later."""
    other = write_world(world.parent / name, 4, 6)
    known_ms = START_MS + add_ms + (1 + np.tile(np.arange(6), 4)) * 30_000
    table = pq.read_table(other / "segments.parquet").set_column(1, "known_ms", pa.array(known_ms))
    pq.write_table(table, other / "segments.parquet")
    return other


def test_segments_with_other_times_or_rooms_are_others(world: Path) -> None:
    codes = CodeFile.read(world / "codes.parquet")
    segments, embedded = segments_of_codes(str(world), codes)
    assert len(segments) == 24 and not embedded
    for changed in ("item_id", "author_id", "known_ms", "segment"):
        other = replace(codes, **{changed: getattr(codes, changed) + 1})
        with pytest.raises(UserError, match=r"give a code file of this dataset"):
            segments_of_codes(str(world), other)


def test_code_files_are_compared_with_another_dataset(world: Path, tmp_path: Path) -> None:
    sets = {"raw": CodesConfig(file=str(world / "codes.parquet"))}
    same, other = other_world(world, "same", 0), other_world(world, "other", 1000)
    check_dataset(sets, str(world), str(world))
    check_dataset(sets, str(world), str(same))
    with pytest.raises(UserError, match=r"^features.codes.raw: .*has segment 0 of room 0, which .*other"):
        check_dataset(sets, str(world), str(other))
    # A part of a dataset for scoring has no segments to compare with.
    (other / "segments.parquet").unlink()
    assert not has_segments(str(other)) and has_segments(str(same))
    check_dataset(sets, str(world), str(other))


def test_a_code_file_inside_of_the_dataset_is_looked_for_in_the_other_one(world: Path, tmp_path: Path) -> None:
    inside, outside = CodesConfig(file=str(world / "codes.parquet")), CodesConfig(file=str(tmp_path / "own.parquet"))
    config = FeatureConfig(codes={"inside": inside, "outside": outside})
    found, moved = inside_dataset(config, str(world), str(tmp_path / "copy"))
    assert {name: one.file for name, one in found.codes.items()} == {
        "inside": str(tmp_path / "copy" / "codes.parquet"),
        "outside": outside.file,
    }
    assert moved == frozenset() and inside_dataset(config, str(world), str(world)) == (config, frozenset())
