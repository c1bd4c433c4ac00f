"""Tests of the features of candidates: missing values are read as in a log."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.small_visits import SPEC
from trainer.console.errors import UserError
from trainer.serving.scoring import read_candidates

KEYS = {"user_id": [1, 2], "item_id": [3, 4], "author_id": [5, 6], "request_ms": [1_650_000_000_000] * 2}


def read(tmp_path: Path, **columns: pa.Array) -> dict[str, np.ndarray]:
    """Read candidates with some features of the request: ``tab`` is categorical, ``load`` is dense."""
    pq.write_table(pa.table({**KEYS, **columns}), tmp_path / "candidates.parquet")
    return read_candidates(tmp_path / "candidates.parquet", SPEC)


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()], ids=str)
@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_missing_number_is_0(tmp_path: Path, kind: pa.DataType, missing: float | None) -> None:
    assert read(tmp_path, load=pa.array([2.5, missing]).cast(kind))["load"].tolist() == [2.5, 0]


def test_a_missing_category_is_unknown(tmp_path: Path) -> None:
    assert read(tmp_path, tab=pa.array([3, None], pa.int64()))["tab"].tolist() == [3, 0]
    assert read(tmp_path)["tab"].tolist() == [0, 0]


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 1e300])
def test_a_number_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(UserError, match=r"candidates\.parquet: column 'load' is .*inf in row 1; it must be finite"):
        read(tmp_path, load=pa.array([1.0, value]))
