"""Tests of logged features: they stay with their events when these are cut, selected, reordered or concatenated."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stream.random_logs import SPEC
from trainer.stream.sources.logged_features import FEATURES, RequestFeatures, empty_features

CARRIES = st.lists(st.booleans(), max_size=12)


def logged(carries: list[bool], first: int = 0) -> RequestFeatures:
    """Return features of the events where ``carries`` is set; those of event k are all equal to ``first + k``."""
    at = np.flatnonzero(np.array(carries, bool))
    none = empty_features(SPEC)
    columns = [getattr(none, name) for name in FEATURES]
    return RequestFeatures(at, *(np.repeat(at[:, None] + first, c.shape[1], axis=1).astype(c.dtype) for c in columns))


def seen(found: RequestFeatures) -> list[tuple[int, int]]:
    """Return (position, value) of all features, and check that all columns of an event agree."""
    for name in FEATURES:
        column = getattr(found, name)
        assert column.shape == (len(found), getattr(empty_features(SPEC), name).shape[1])
        assert (column == column[:, :1]).all()
        np.testing.assert_array_equal(column[:, 0], found.side[:, 0])
    return list(zip(found.at.tolist(), found.side[:, 0].tolist(), strict=True))


@settings(max_examples=200, deadline=None)
@given(carries=CARRIES, data=st.data())
def test_a_part_and_any_selection(carries: list[bool], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(carries)))
    stop = data.draw(st.integers(first, len(carries)))
    assert seen(logged(carries).part(first, stop)) == [(k - first, k) for k in range(first, stop) if carries[k]]
    chosen = data.draw(st.permutations(range(len(carries))))[: data.draw(st.integers(0, len(carries)))]
    taken = logged(carries).take(np.array(chosen, np.int64))
    assert seen(taken) == [(place, k) for place, k in enumerate(chosen) if carries[k]]


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(CARRIES, min_size=1, max_size=5))
def test_joined_parts_are_the_whole(parts: list[list[bool]]) -> None:
    starts = np.cumsum([0, *map(len, parts)]).tolist()
    whole = RequestFeatures.join(
        [logged(part, start) for part, start in zip(parts, starts[:-1], strict=True)], list(map(len, parts))
    )
    assert seen(whole) == seen(logged([carries for part in parts for carries in part]))
