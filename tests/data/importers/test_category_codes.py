"""Tests of the one spelling of a category: Parquet of any type and CSV give the same, and different values differ."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.importers.category_codes import category_text, distinct_values, encode, vocabulary
from trainer.data.importers.field_parsers import codes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", "1"),
        ("1.0", "1"),
        ("1.", "1"),
        ("1.000", "1"),
        (" 1 ", "1"),
        ("-0.0", "0"),
        ("01", "01"),
        ("8.10", "8.10"),
        ("2.5", "2.5"),
        ("1e-07", "1e-7"),
        ("1E+05", "100000"),
        ("1e5", "1e5"),
        ("9007199254740993.0", "9007199254740993"),
        ("1e+999", "1e+999"),
        ("True", "true"),
        ("FALSE", "false"),
        ("tRUE", "tRUE"),
        (" Berlin", "Berlin"),
        ("a b", "a b"),
        ("", None),
        ("  ", None),
    ],
)
def test_a_text_has_one_spelling(text: str, expected: str | None) -> None:
    assert category_text(pa.array([text])).to_pylist() == [expected]
    assert category_text(pa.array([text, "x"]).dictionary_encode()).to_pylist() == [expected, "x"]
    assert category_text(pa.array([text], pa.large_string())).to_pylist() == [expected]


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        (pa.array([1, 1 << 62, None], pa.int64()), ["1", str(1 << 62), None]),
        (pa.array([(1 << 64) - 1], pa.uint64()), [str((1 << 64) - 1)]),
        (
            pa.array([1.0, 2.5, float("nan"), None, -0.0, 1e-7, 1e15]),
            ["1", "2.5", None, None, "0", "1e-7", f"{10**15}"],
        ),
        (pa.array(np.array([1, 0.1], np.float32)), ["1", "0.1"]),
        (pa.array(np.array([1, 2047], np.float16)), ["1", "2047"]),
        (
            pa.array([1e10 + 0.5, 1.5e-7, -(2.0**52) - 0.5, None]),
            ["10000000000.5", "1.5e-7", "-4503599627370496", None],
        ),
        (pa.array([2.0**51 + 0.5, float("nan")]), ["2251799813685248.5", None]),
        (pa.array([True, False, None]), ["true", "false", None]),
        (pa.array([datetime.date(2022, 5, 4)]), ["2022-05-04"]),
        (pa.array([datetime.datetime(2022, 5, 4)], pa.timestamp("us")), ["2022-05-04 00:00:00"]),
        (pa.array(["1", "1.00"]).cast(pa.decimal128(9, 2)), ["1", "1"]),
    ],
)
def test_each_type_has_the_text_of_a_csv(values: pa.Array, texts: list[str | None]) -> None:
    assert category_text(values).to_pylist() == texts
    assert category_text(pa.array(texts)).to_pylist() == texts


@pytest.mark.parametrize("value", [2.0**53, float("inf"), -float("inf")])
def test_floats_that_are_no_category_are_refused(value: float) -> None:
    with pytest.raises(pa.ArrowInvalid):
        category_text(pa.array([1.0, value]))


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "int": st.one_of(st.integers(-3, 12), st.integers(-(1 << 63), (1 << 63) - 1)),
    "float": st.one_of(
        st.integers(-3, 12).map(float),
        st.floats(-(2.0**53), 2.0**53, exclude_min=True, exclude_max=True),
        # Whether an exponent is written depends on the size.
        st.tuples(st.integers(-20, 52), st.floats(1, 2, exclude_max=True)).map(
            lambda drawn: drawn[1] * 2.0 ** drawn[0]
        ),
    ),
    "bool": st.booleans(),
    "date": st.dates(),
    "text": st.text(st.characters(codec="utf-8", exclude_characters=" \t\r\n\v\f"), min_size=1, max_size=3),
}
TYPES = {"int": pa.int64(), "float": pa.float64(), "bool": pa.bool_(), "date": pa.date32(), "text": pa.string()}


def spellings(value: Any) -> list[str]:
    """Return the texts that programs write for a value."""
    if isinstance(value, bool):
        return [str(value), str(value).lower(), str(value).upper()]
    if isinstance(value, int):
        return [str(value), f"{value}.0", f" {value}"]
    if isinstance(value, float):
        arrow = pa.array([value]).cast(pa.string())[0].as_py()
        return [repr(value), arrow, *([str(int(value)), f"{int(value)}."] if value.is_integer() else [])]
    return [str(value), f"{value} "]


def check_spelling(kind: str, values: list[Any], choose: list[int]) -> None:
    """Check that Parquet and any spelling in CSV give the same categories, one for each value."""
    typed = category_text(pa.array(values, TYPES[kind])).to_pylist()
    csv = [spellings(value)[which % len(spellings(value))] for value, which in zip(values, choose, strict=False)]
    assert category_text(pa.array(csv)).to_pylist() == typed[: len(csv)]
    if kind != "text":
        # Two texts may be one number: that is tested above.
        assert len(set(typed)) == len(set(values))
        known = vocabulary(distinct_values([pa.array(values, TYPES[kind])], ()))
        assert [known[code - 1] for code in encode(pa.array(csv), known)] == typed[: len(csv)]


CHOICES = st.lists(st.integers(0, 11), min_size=1, max_size=5)
KINDS = st.sampled_from(list(VALUES)).flatmap(
    lambda kind: st.tuples(st.just(kind), st.lists(VALUES[kind], min_size=1, max_size=5))
)


@settings(max_examples=500, deadline=None)
@given(KINDS, CHOICES)
def test_every_value_has_one_category(drawn: tuple[str, list[Any]], choose: list[int]) -> None:
    check_spelling(*drawn, choose)


@pytest.mark.slow
@settings(max_examples=100_000, deadline=None)
@given(KINDS, CHOICES)
def test_every_value_has_one_category_at_length(drawn: tuple[str, list[Any]], choose: list[int]) -> None:
    check_spelling(*drawn, choose)


def test_null_markers_are_compared_by_their_spelling() -> None:
    values = [pa.array(["-124", "NA", "x", " NA", None]), pa.array([-124.0, 3.0])]
    assert distinct_values(values, ("-124.0", "NA")) == {"x", "3"}


def test_the_order_of_a_vocabulary_does_not_depend_on_hashes() -> None:
    assert vocabulary({"01", "1", "2", "10", "001"}) == vocabulary(["1", "2", "001", "10", "01"])
    assert vocabulary({"01", "1", "2", "10", "001"}) == ("001", "01", "1", "2", "10")
    assert vocabulary({"b", "10", "9"}) == ("10", "9", "b")


def test_names_are_compared_as_categories() -> None:
    assert codes(pa.array(["1.0", "2", " 1"]), ["1", "2"]).to_pylist() == [0, 1, 0]
    assert codes(pa.array([1.0, 2.0]), ["1.0", "2"]).to_pylist() == [0, 1]
    assert codes(pa.array(["NULL", None, ""]), ["", "NULL"]).to_pylist() == [1, 0, 0]
    for wrong in (None, "3", "01"):
        with pytest.raises(pa.ArrowInvalid):
            codes(pa.array(["1", wrong]), ["1", "2"])
