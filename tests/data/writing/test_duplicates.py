"""Tests of lines that are in a log twice: the search against a loop, and the rules of the builder."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.small_visits import make_visits
from trainer.data.writing.duplicates import VISIT_KEY, DuplicateRule, find_duplicates

NAMES = ("user_id", "item_id", "value")
LINES = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.sampled_from([0.0, 0.5])), max_size=30)


def check_search(lines: list[tuple[Any, ...]]) -> None:
    """Check the search against a loop over the lines."""
    columns = {name: np.array([line[k] for line in lines]) for k, name in enumerate(NAMES)}
    first, repeats = find_duplicates(columns, NAMES[:2], NAMES)
    assert first.tolist() == [row for row, line in enumerate(lines) if line[:2] not in {one[:2] for one in lines[:row]}]
    assert repeats.tolist() == [row for row, line in enumerate(lines) if line in lines[:row]]


@settings(max_examples=500, deadline=None)
@given(LINES)
def test_the_search_equals_a_loop(lines: list[tuple[Any, ...]]) -> None:
    check_search(lines)


@pytest.mark.slow
@settings(max_examples=100_000, deadline=None)
@given(LINES)
def test_the_search_equals_a_loop_at_length(lines: list[tuple[Any, ...]]) -> None:
    check_search(lines)


@pytest.mark.parametrize(
    ("drop", "own_ids", "kept", "exact"),
    [
        ("visits", False, [0, 2], 1),
        ("lines", False, [0, 2, 3], 1),
        ("none", False, [0, 1, 2, 3], 1),
        ("lines", True, [0, 1, 2, 3], 0),
    ],
)
def test_rules(drop: Any, own_ids: bool, kept: list[int], exact: int) -> None:
    """Line 1 repeats line 0, with another visit_id; line 3 has the key of line 2 and another time watched."""
    visits = {name: np.repeat(column[[0, 4]], 2) for name, column in make_visits(0).items()}
    visits["visit_id"] = np.arange(4)
    visits["play_ms"][3] += 1
    assert any((visits[name][0] != visits[name][2]) for name in VISIT_KEY)
    left, found = DuplicateRule(drop, visit_ids=own_ids).apply(visits)
    assert (left["visit_id"].tolist(), found) == (kept, exact)
