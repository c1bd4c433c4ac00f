"""IdIndex against a dictionary."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.format.id_index import IdIndex

ids = st.integers(min_value=-(2**63), max_value=2**63 - 1) | st.integers(min_value=0, max_value=20)


@given(st.lists(st.lists(ids, max_size=40), max_size=8), st.lists(ids, max_size=20))
def test_same_numbers_as_a_dictionary(batches, asked):
    index = IdIndex()
    known: dict[int, int] = {}
    for batch in batches:
        numbers = index.add(np.array(batch, np.int64)).tolist()
        for number, value in sorted(zip(numbers, batch, strict=True)):
            assert known.setdefault(value, number) == number
        assert sorted(known.values()) == list(range(len(known))) and len(index) == len(known)
    assert index.ids.tolist() == sorted(known, key=known.__getitem__)
    assert index.find(np.array(asked, np.int64)).tolist() == [known.get(value, -1) for value in asked]


@pytest.mark.parametrize(
    "make",
    [
        lambda rng: np.arange(50_000) * 4096,
        lambda rng: np.arange(50_000) << 32,
        lambda rng: rng.integers(0, 2**62, 50_000),
        lambda rng: rng.zipf(1.3, 50_000) % 10**9,
    ],
    ids=["multiples", "high bits", "random", "skewed"],
)
def test_grows_over_any_pattern_of_ids(make):
    values = make(np.random.default_rng(0))
    index = IdIndex()
    numbers = np.concatenate([index.add(part) for part in np.array_split(values, 13)])
    np.testing.assert_array_equal(index.ids[numbers], values)
    assert len(index) == len(np.unique(values))
    np.testing.assert_array_equal(index.find(values), numbers)
    assert (index.find(np.array([-5, 2**62 + 1])) == -1).all()
