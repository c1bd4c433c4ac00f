"""Maps between rows of the same meaning in two models, against a separate lookup of every id."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.features import FeatureConfig, HistoryConfig, TableConfig
from trainer.console.errors import UserError
from trainer.data.features.fit import FittedFeatures
from trainer.data.features.packed_side import side_ranges
from trainer.ranking.row_mapping import ModelFeatures, RangeMap, RowMap, VocabularyMap, map_rows

LAYOUT = {
    "behaviours": ["click", "like", "gift"],
    "candidates": ["video", "live"],
    "side": [["hour", 24], ["city", 9], ["tag", 30]],
    "dense": [],
    "statistics": [],
}


def side(config: FeatureConfig | None = None, **layout: Any) -> ModelFeatures:
    """Return the features of a model on the layout ``LAYOUT`` with changes."""
    nothing = np.empty(0)
    fitted = FittedFeatures({**LAYOUT, **layout}, {}, nothing, nothing, nothing)
    return ModelFeatures(config or FeatureConfig(), fitted)


def pairs(rows: RowMap, old_rows: int, step: int) -> list[tuple[int, int]]:
    """Return all pairs of a map, read in parts of ``step`` old rows."""
    found = []
    for first in range(0, old_rows, step):
        last = min(first + step, old_rows)
        old, new = rows.of(first, last)
        assert ((old >= first) & (old < last)).all()
        found += list(zip(old.tolist(), new.tolist(), strict=True))
    assert len(found) == rows.taken
    return found


IDS = st.sets(st.integers(-50, 50), max_size=40).map(sorted).map(tuple)


@given(theirs=IDS, ours=IDS, step=st.integers(1, 60))
def test_rows_of_looked_up_ids_follow_the_ids(theirs: tuple[int, ...], ours: tuple[int, ...], step: int) -> None:
    row_of = {identity: row for row, identity in enumerate(ours, 1)}
    expected = [(0, 0)] + [(row, row_of[identity]) for row, identity in enumerate(theirs, 1) if identity in row_of]
    rows = VocabularyMap(np.array(theirs, np.int64), np.array(ours, np.int64))
    assert pairs(rows, len(theirs) + 1, step) == expected


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 6)), max_size=5), st.integers(1, 9))
def test_ranges_keep_their_order(gaps: list[tuple[int, int, int]], step: int) -> None:
    ranges, expected, old, new = [], [], 0, 0
    for old_gap, new_gap, rows in gaps:
        old, new = old + old_gap, new + new_gap
        ranges.append((old, new, rows))
        expected += [(old + k, new + k) for k in range(rows)]
        old, new = old + rows, new + rows
    assert pairs(RangeMap(ranges), old + 3, step) == expected


def test_direct_and_hashed_tables_keep_their_rows() -> None:
    config = FeatureConfig(item=TableConfig(ids="hash", rows=30))
    assert pairs(map_rows("user", side(), side(), 20, 31), 20, 7) == [(row, row) for row in range(20)]
    assert pairs(map_rows("item", side(config), side(config), 30, 30), 30, 7) == [(row, row) for row in range(30)]
    with pytest.raises(UserError, match="had 30 rows and has 29 now; a table can only grow"):
        map_rows("user", side(), side(), 30, 29)
    with pytest.raises(UserError, match=r"it had 30 rows where it has 31 now; set features\.item\.rows = 30"):
        map_rows("item", side(config), side(config), 30, 31)


@pytest.mark.parametrize(("then", "now"), [("direct", "hash"), ("lookup", "direct"), ("hash", "lookup")])
def test_another_mapping_is_refused(then: str, now: str) -> None:
    configs = [
        FeatureConfig(item=TableConfig(ids=ids, rows=30 if ids == "hash" else None))  # type: ignore[arg-type]
        for ids in (then, now)
    ]
    with pytest.raises(UserError, match=f"mapped by '{then}' and are now by '{now}'"):
        map_rows("item", *(side(config) for config in configs), 30, 30)


@pytest.mark.parametrize(("then", "now"), [("dynamic", "dynamic"), ("dynamic", "hash"), ("direct", "dynamic")])
def test_dynamic_ids_are_refused(then: str, now: str) -> None:
    configs = [
        FeatureConfig(item=TableConfig(ids=ids, rows=None if ids == "direct" else 30))  # type: ignore[arg-type]
        for ids in (then, now)
    ]
    with pytest.raises(UserError, match=r"table 'item': dynamic ids are not taken over.*init_from\.tables"):
        map_rows("item", *(side(config) for config in configs), 30, 30)


def side_pairs(old: ModelFeatures, new: ModelFeatures) -> set[tuple[int, int]]:
    before, now = (side_ranges(each.fitted.layout, each.config) for each in (old, new))
    return {(0, 0)} | {
        (rows.start + value, now[name].start + value)
        for name, rows in before.items()
        if name in now
        for value in range(len(rows))
    }


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (side(), side()),
        (side(), side(side=[["hour", 24], ["city", 12], ["tag", 31]])),
        (side(FeatureConfig(exclude=("city",))), side()),
        (side(), side(FeatureConfig(exclude=("hour", "domain")))),
        (side(FeatureConfig(history={})), side()),
        (side(candidates=["live"]), side(side=[["new", 5], ["hour", 24], ["city", 9], ["tag", 30]])),
        (side(), side(behaviours=["click", "like", "gift", "follow"])),
    ],
)
def test_features_of_the_packed_table_keep_their_values(old: ModelFeatures, new: ModelFeatures) -> None:
    rows = max(each.stop for each in side_ranges(old.fitted.layout, old.config).values())
    found = pairs(map_rows("side", old, new, 0, 0), rows, 11)
    assert set(found) == side_pairs(old, new) and len(found) == len(set(found))


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (side(side=[["hour", 24], ["city", 8], ["tag", 30]]), "feature city had 9 values and has 8 now"),
        (side(side=[["city", 9], ["hour", 24], ["tag", 30]]), "in another order"),
        (side(behaviours=["click", "gift", "like"]), "now have click, gift, like; new ones must follow the old ones"),
        (side(behaviours=["click", "like"]), "behaviours of a past visit had 8 values and has 4"),
    ],
)
def test_side_features_that_mean_something_else_are_refused(new: ModelFeatures, message: str) -> None:
    with pytest.raises(UserError, match=message):
        map_rows("side", side(), new, 0, 0)


def test_histories_may_change_without_moving_rows() -> None:
    other = replace(side(), config=FeatureConfig(history={"only": HistoryConfig(domain="live", length=3)}))
    assert set(pairs(map_rows("side", side(), other, 0, 0), 200, 50)) == side_pairs(side(), side())
