"""Sums in fixed point against sums of Python's fractions, on a CPU and by the operations for a GPU."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.semantic_ids.fixed_point import FixedPoint, magnitude_of


@given(st.data())
def test_sums_are_those_of_rounded_fractions_on_every_device(data: st.DataObject) -> None:
    rows, columns, codes = (data.draw(st.integers(1, most)) for most in (6, 4, 3))
    value = st.floats(-8, 8, width=32)
    values = [[data.draw(value) for _ in range(columns)] for _ in range(rows)]
    code, weight = ([data.draw(st.integers(0, most)) for _ in range(rows)] for most in (codes - 1, 5))
    scale = FixedPoint(data.draw(st.integers(0, 40)))
    expected = [[0] * columns for _ in range(codes)]
    for row in range(rows):
        for column in range(columns):
            # Python rounds halves to even, as both implementations do.
            expected[code[row]][column] += weight[row] * round(Fraction(values[row][column]) * 2**scale.exponent)
    for add in (scale.add_rows, scale.add_rows_by_index):
        sums = torch.zeros(codes, columns, dtype=torch.int64)
        add(sums, torch.tensor(code, dtype=torch.int32), torch.tensor(values), torch.tensor(weight))
        assert sums.tolist() == expected
    total = scale.values(torch.tensor(expected))
    assert total.tolist() == [[float(Fraction(one, 2**scale.exponent)) for one in line] for line in expected]
    assert scale.value(expected[0][0]) == total[0, 0]


@given(st.integers(0, 1 << 40), st.floats(1e-6, 1e12))
def test_the_finest_scale_holds_the_largest_sum(weight: int, largest: float) -> None:
    scale = FixedPoint.of(weight, magnitude_of(largest))
    whole = max(1, weight) * round(Fraction(largest) * Fraction(2) ** scale.exponent)
    assert 0.99 * 2**60 < whole < 1.01 * 2**62


@pytest.mark.parametrize(
    ("largest", "magnitude"), [(0.0, -60), (1e-30, -60), (1.0, 0), (1.5, 1), (2.0, 1), (0.25, -2), (5.0, 3)]
)
def test_a_magnitude_is_the_smallest_power_of_two_that_is_not_below(largest: float, magnitude: int) -> None:
    assert magnitude_of(largest) == magnitude
