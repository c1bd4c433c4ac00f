"""Statistics of requests in the order of time are those of one pass over the dataset, however they are divided."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.format import moving_statistics
from trainer.data.format.dataset import Dataset, statistics_as_of
from trainer.data.format.moving_statistics import MovingStatistics
from trainer.data.format.schema import DatasetSpec, Rows, SideFeature
from trainer.data.format.shards import RecordIndex

SPEC = DatasetSpec(
    name="t",
    source="",
    licence="",
    partitions=2,
    timezone="UTC",
    behaviours=("click", "gift"),
    applies={"click": ("live",), "gift": ("live",)},
    candidates=("live",),
    side=(SideFeature("genre", "author", 3),),
    statistics=(("author",), ("genre",)),
)


class StoredRows:
    """Rows of a dataset in two partitions of some records; counts how often each record is read."""

    partitions = 2

    def __init__(self, rows: Rows, records: int) -> None:
        n = len(rows["emit_ms"])
        places = [np.array_split(np.arange(part, n, 2), records) for part in range(2)]
        self._parts = [[{name: column[at] for name, column in rows.items()} for at in part] for part in places]
        self.reads: dict[tuple[int, int], int] = {}

    def records(self, partition: int) -> RecordIndex:
        def of(name: str, extreme: Any) -> np.ndarray:
            return np.array([extreme(part[name]) if len(part[name]) else 0 for part in self._parts[partition]])

        times = [of(name, extreme) for name in ("request_ms", "emit_ms") for extreme in (np.min, np.max)]
        return RecordIndex(np.array([len(part["emit_ms"]) for part in self._parts[partition]]), *times)

    def read(self, partition: int, record: int) -> Rows:
        self.reads[partition, record] = self.reads.get((partition, record), 0) + 1
        return self._parts[partition][record]


def make_rows(seed: int, n: int, span: int) -> Rows:
    rng = np.random.default_rng(seed)
    request = np.sort(rng.integers(0, span, n))
    return {
        **{name: rng.integers(0, 3, n) for name in ("user_id", "author_id", "item_id")},
        "side": rng.integers(0, 3, (n, 1)).astype(np.int32),
        "request_ms": request,
        "emit_ms": request + rng.integers(0, 20, n),
        "label": rng.integers(0, 2, (n, 2)).astype(np.uint8),
        "mask": rng.integers(0, 2, (n, 2)).astype(np.uint8),
    }


def dataset(rows: Rows, records: int) -> tuple[Dataset, StoredRows]:
    store = StoredRows(rows, records)
    return Dataset(SPEC, store, None), store  # type: ignore[arg-type]


@given(st.integers(0, 2**32), st.integers(0, 60), st.integers(1, 6), st.sampled_from([1, 15, 500]), st.integers(1, 9))
@settings(deadline=None, max_examples=60)
def test_requests_in_parts_have_the_counts_of_one_pass(
    seed: int, n: int, records: int, window: int, parts: int
) -> None:
    data, _ = dataset(make_rows(seed, n, 100), records)
    requests = make_rows(seed + 1, 40, 160)
    # Some requests come late, also by more than the window.
    requests["request_ms"] = requests["request_ms"] - np.random.default_rng(seed).choice([0, 0, 0, 9, 60], 40)
    expected = statistics_as_of(data, requests)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moving_statistics, "WINDOW_MS", window)
        moving = MovingStatistics(data)
        found = [
            moving.as_of({name: column[at] for name, column in requests.items()})
            for at in np.array_split(np.arange(40), parts)
        ]
    assert found[0].dtype == np.float32
    np.testing.assert_array_equal(np.concatenate(found), expected)


def test_each_record_is_read_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving_statistics, "WINDOW_MS", 10)
    data, store = dataset(make_rows(1, 4000, 2000), 50)
    moving = MovingStatistics(data)
    requests = make_rows(2, 3000, 3000)
    for at in np.array_split(np.arange(3000), 1000):
        moving.as_of({name: column[at] for name, column in requests.items()})
    assert len(store.reads) == 100 and max(store.reads.values()) <= 12


def test_large_counts_are_rounded_once() -> None:
    """2^24 + 1 and 1 are 2^24 + 2, which float32 holds; 2^24 + 1 alone is no float32."""
    data, _ = dataset(make_rows(3, 1, 1), 1)
    rows = {name: np.repeat(column, 2, axis=0) for name, column in make_rows(3, 1, 1).items()}
    rows["emit_ms"] = np.array([0, 7_200_000])
    data = replace(data, store=StoredRows(rows, 1))  # type: ignore[arg-type]
    moving = MovingStatistics(data)
    moving.as_of({**make_rows(3, 1, 1), "request_ms": np.array([7_300_000])})
    for counts in moving._before._counts:
        counts.values[counts.values > 0] = (1 << 24) + 1
    found = moving.as_of({**make_rows(3, 1, 1), "request_ms": np.array([7_300_000])})
    assert found[0, 0] == (1 << 24) + 2
