"""Rows of the truth are those of the visits that are asked for, with their types."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.data.small_visits import BEHAVIOURS, build_dataset, make_visits
from trainer.console.errors import UserError
from trainer.data.format.truth_rows import FACTORS, PROBABILITIES, read_truth_rows

KEYS = ("visit_id", "user_id", "request_ms")


def test_rows_are_those_of_the_visits(tmp_path: Path) -> None:
    visits, rng = make_visits(3), np.random.default_rng(1)
    truth = {name: visits[name] for name in KEYS}
    truth |= {f"p_{name}": rng.random(len(visits["visit_id"])).astype(np.float32) for name in BEHAVIOURS}
    path = str(tmp_path / "world")
    build_dataset(tmp_path / "world", visits, truth=pa.table(truth))
    asked = rng.permutation(len(visits["visit_id"]))[:50]
    user_id, visit_id = visits["user_id"][asked], visits["visit_id"][asked]
    found = read_truth_rows(path, PROBABILITIES, user_id, visit_id, ["request_ms", "p_like"])
    assert found is not None and list(found) == ["request_ms", "p_like"] and found["request_ms"].dtype == np.int64
    assert np.array_equal(found["request_ms"], visits["request_ms"][asked])
    assert np.array_equal(found["p_like"], truth["p_like"][asked])
    assert read_truth_rows(path, FACTORS, user_id, visit_id, ["mood"]) is None
    empty = read_truth_rows(path, PROBABILITIES, user_id[:0], visit_id[:0], ["p_like"])
    assert empty is not None and empty["p_like"].tolist() == []
    with pytest.raises(UserError, match=r"world/truth/part-0000\d.parquet: damaged, or of another world"):
        read_truth_rows(path, PROBABILITIES, user_id, visit_id + 10**6, ["p_like"])
