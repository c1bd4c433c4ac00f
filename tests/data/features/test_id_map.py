"""Maps from ids to rows, against Python integers and dictionaries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.embeddings import Dynamic
from trainer.config.features import TableConfig
from trainer.console.errors import UserError
from trainer.data.features.id_map import NO_ID, IdMap, hash_salt, table_rows
from trainer.data.format.schema import DatasetSpec, IdSpace

INT64 = st.integers(-(2**63), 2**63 - 1)


def rows_of(table: IdMap, ids: list[int]) -> list[int]:
    out = np.full(len(ids), -7, np.int64)
    table(np.array(ids, np.int64), out)
    return out.tolist()


@given(st.sets(INT64, max_size=50), st.lists(INT64, max_size=50))
def test_lookup_gives_known_ids_a_row_each_and_others_row_0(known, others):
    vocabulary = sorted(known)
    table = IdMap("item", "lookup", len(vocabulary) + 1, np.array(vocabulary, np.int64))
    expected = {value: row for row, value in enumerate(vocabulary, 1)}
    asked = [*vocabulary, *others]
    assert rows_of(table, asked) == [expected.get(value, 0) for value in asked]


@given(st.lists(INT64, max_size=50), st.integers(2, 2**31))
def test_hash_is_the_scaled_upper_half_of_a_mix(ids, rows):
    word = (1 << 64) - 1
    table = IdMap("item", "hash", rows)
    salt = int(table._salt)
    expected = []
    for value in ids:
        mixed = (value & word) ^ salt
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & word
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & word
        expected.append(1 + ((mixed >> 32) * (rows - 1) >> 32))
    assert rows_of(table, ids) == expected
    assert all(1 <= row < rows for row in expected)


@given(st.lists(INT64, max_size=50))
def test_dynamic_ids_stay_as_they_are(ids):
    assert rows_of(IdMap("item", "dynamic", 9), ids) == ids


def test_the_unknown_id_is_row_0_and_an_id_of_its_own_in_a_dynamic_table():
    unknown = {name: IdMap("item", name, 10).unknown for name in ("direct", "hash", "lookup", "dynamic")}
    assert unknown == {"direct": 0, "hash": 0, "lookup": 0, "dynamic": NO_ID} and np.iinfo(np.int64).max == NO_ID


def test_dynamic_ids_have_defaults():
    assert TableConfig(ids="hash", rows=9).dynamic is None
    assert TableConfig(ids="dynamic", rows=9).dynamic == Dynamic(admit_after=2, evict="recency")
    table = TableConfig(ids="dynamic", rows=9, admit_after=1, evict="both")
    assert table.dynamic == Dynamic(admit_after=1, evict="both")


def test_hash_spreads_neighbouring_ids_evenly_and_differently_per_table():
    ids = np.arange(200_000)
    rows = {}
    for name in ("user", "item"):
        rows[name] = np.empty_like(ids)
        IdMap(name, "hash", 101)(ids, rows[name])
        counts = np.bincount(rows[name], minlength=101)
        assert counts[0] == 0
        # 100 cells of 2,000 expected: chi-squared has 99 degrees of freedom, and exceeds 160 once in ten thousand.
        assert ((counts[1:] - 2000) ** 2 / 2000).sum() < 160
    assert (rows["user"] == rows["item"]).mean() < 0.02


def test_direct_is_the_next_row():
    assert rows_of(IdMap("user", "direct", 12), [0, 10, 3, 3]) == [1, 11, 4, 4]
    assert rows_of(IdMap("user", "direct", 12), []) == []


@pytest.mark.parametrize("new", [11, 2**62, 2**63 - 1])
def test_direct_ids_beyond_the_table_are_unknown_and_counted(new):
    out = np.full(4, 9, np.int64)
    assert IdMap("author", "direct", 12)(np.array([3, new, 10, new]), out) == 2
    assert out.tolist() == [4, 0, 11, 0]


def test_direct_refuses_negative_ids():
    with pytest.raises(UserError, match="author id -1 is negative"):
        rows_of(IdMap("author", "direct", 12), [3, -1, 5])


@given(
    st.sampled_from(["direct", "hash", "lookup"]),
    st.lists(st.one_of(st.integers(0, 20), st.integers(0, 2**63 - 1)), max_size=6),
)
@settings(max_examples=1_000, deadline=None)
def test_every_id_has_a_row_of_the_table(mapping, ids):
    table = IdMap("item", mapping, 12, np.arange(11) if mapping == "lookup" else None)
    out = np.full(len(ids), -9, np.int64)
    beyond = table(np.array(ids, np.int64), out)
    assert ((out >= 0) & (out < 12)).all()
    if mapping != "hash":
        assert out.tolist() == [each + 1 if each < 11 else 0 for each in ids]
    assert beyond == (sum(each > 10 for each in ids) if mapping == "direct" else 0)


def test_rows_of_a_table():
    spec = DatasetSpec(
        "x", "", "", 1, "UTC", (), {}, (), ids={name: IdSpace(5, 40) for name in ("user", "author", "item")}
    )
    assert table_rows("item", TableConfig(), spec, 0) == 42
    assert table_rows("item", TableConfig(rows=100), spec, 0) == 100
    assert table_rows("item", TableConfig(ids="hash", rows=10), spec, 0) == 10
    assert table_rows("item", TableConfig(ids="lookup"), spec, 17) == 18
    with pytest.raises(UserError, match=r"features.item.rows = 41: .* is 40, so direct ids need 42 rows"):
        table_rows("item", TableConfig(rows=41), spec, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ids": "hash"}, "needs `rows`"),
        ({"ids": "lookup", "rows": 10}, "remove `rows`"),
        ({"ids": "direct", "min_count": 2}, "`min_count` works only with"),
        ({"ids": "dynamic"}, "'dynamic' needs `rows`"),
        ({"ids": "hash", "rows": 9, "admit_after": 2}, "`admit_after` and `evict` work only with"),
        ({"evict": "both"}, "`admit_after` and `evict` work only with"),
        ({"ids": "dynamic", "rows": 9, "admit_after": 0}, "greater than or equal to 1"),
        ({"ids": "dynamic", "rows": 9, "evict": "oldest"}, "'recency', 'frequency' or 'both'"),
        ({"ids": "dynamic", "rows": 9, "sharding": "column_wise"}, "'table_wise' or 'row_wise', not 'column_wise'"),
        ({"ids": "crc"}, "'direct', 'hash', 'lookup' or 'dynamic'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TableConfig(**options)


def test_the_salt_of_a_table_never_changes_since_trained_rows_depend_on_it():
    """The CRC-32 of its name, bit by bit, times 2^64 / golden ratio."""
    golden = 0x9E3779B97F4A7C15
    for table in ("user", "author", "item"):
        crc = 0xFFFFFFFF
        for byte in table.encode():
            crc ^= byte
            for _ in range(8):
                crc = crc >> 1 ^ (0xEDB88320 if crc & 1 else 0)
        assert int(hash_salt(table)) == (crc ^ 0xFFFFFFFF) * golden % 2**64
