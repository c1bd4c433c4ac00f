"""Selections of rows by time and domain, against a look at each row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.format.time_selection import Selection

TIMES = st.integers(0, 9)
BOUNDS = st.fixed_dictionaries(
    {}, optional={name: TIMES for name in ("emit_from", "emit_until", "request_from", "request_until")}
)


class Records:
    """Index of records of rows ``(request, emission)``."""

    def __init__(self, records: list[list[tuple[int, int]]]) -> None:
        for name, column in (("request", 0), ("emit", 1)):
            times = [[row[column] for row in record] for record in records]
            setattr(self, f"{name}_min", np.array([min(each) for each in times], np.int64))
            setattr(self, f"{name}_max", np.array([max(each) for each in times], np.int64))


@given(st.lists(st.lists(st.tuples(TIMES, TIMES), min_size=1, max_size=3), min_size=1, max_size=4), BOUNDS)
def test_rows_and_records_of_a_selection(records: list[list[tuple[int, int]]], bounds: dict[str, int]) -> None:
    selection = Selection(**bounds)

    def inside(request: int, emission: int) -> bool:
        return bounds.get("emit_from", 0) <= emission < bounds.get("emit_until", 10) and bounds.get(
            "request_from", 0
        ) <= request < bounds.get("request_until", 10)

    rows = [row for record in records for row in record]
    columns: Any = {"request_ms": np.array([row[0] for row in rows]), "emit_ms": np.array([row[1] for row in rows])}
    assert selection.mask(columns).tolist() == [inside(*row) for row in rows]
    index: Any = Records(records)
    assert selection.covers(index).tolist() == [all(inside(*row) for row in record) for record in records]
    # A record of which no row is selected may be touched, but none with a selected row is missed.
    touched = selection.touches(index)
    for place, record in enumerate(records):
        assert touched[place] or not any(inside(*row) for row in record)
        if len(record) == 1:
            assert touched[place] == inside(*record[0])


def test_a_domain_selects_its_rows_and_covers_no_record() -> None:
    times = np.array([1, 2, 3, 4])
    columns: Any = {"request_ms": times, "emit_ms": times, "domain": np.array([0, 1, 1, 0])}
    live = Selection(request_from=2, domains=("live",))
    assert live.mask(columns).tolist() == [False, True, True, False]
    assert Selection(domains=("video", "live")).mask(columns).all()
    index: Any = Records([[(2, 2)], [(3, 3)]])
    assert live.touches(index).all() and not live.covers(index).any()
    assert str(live).endswith("requested from 1970-01-01T00:00:00.002+00:00, of live")


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        ({}, "at any time"),
        ({"emit_until": 1_700_000_000_123}, "emitted before 2023-11-14T22:13:20.123+00:00"),
        (
            {"request_from": 0, "request_until": 86_400_000},
            "requested from 1970-01-01T00:00:00.000+00:00 and requested before 1970-01-02T00:00:00.000+00:00",
        ),
        ({"emit_from": 1 << 62}, f"emitted from {1 << 62} ms"),
    ],
)
def test_a_selection_is_named_by_its_bounds(bounds: dict[str, int], text: str) -> None:
    assert str(Selection(**bounds)) == text
