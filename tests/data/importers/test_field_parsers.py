"""Tests of the reader of ids: every type and spelling is read as the right id, or refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.importers.field_parsers import IdHash, accepted_ids, integer_ids, numbers

EXACT = {pa.float16(): 2**11, pa.float32(): 2**24, pa.float64(): 2**53}


def read(values: pa.Array) -> list[int] | None:
    """Return the ids, or None if they are refused."""
    try:
        return integer_ids(values).to_pylist()
    except pa.ArrowInvalid:
        return None


@pytest.mark.parametrize("kind", EXACT, ids=str)
def test_floats_hold_ids_up_to_their_bits_only(kind: pa.DataType) -> None:
    limit = EXACT[kind]
    dtype = kind.to_pandas_dtype()
    assert read(pa.array(np.array([0, 7, limit - 1], dtype), kind)) == [0, 7, limit - 1]
    for wrong in (limit, -1, 7.5, float("nan"), float("inf")):
        assert read(pa.array(np.array([7, wrong], dtype), kind)) is None
    assert "int64" in accepted_ids(kind) and "text" in accepted_ids(kind, "user_id")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7", 7),
        ("7.0", 7),
        ("7.", 7),
        ("9007199254740991.0", 2**53 - 1),
        ("9223372036854775807", 2**63 - 1),
        ("9007199254740992.0", None),
        ("9223372036854775808", None),
        ("-7.0", None),
        ("7.5", None),
        ("7e3", None),
        ("", None),
        ("NaN", None),
    ],
)
def test_text_with_a_point_is_the_same_id(text: str, expected: int | None) -> None:
    assert read(pa.array([text])) == (None if expected is None else [expected])
    assert read(pa.array([text, "8"]).dictionary_encode()) == (None if expected is None else [expected, 8])


@pytest.mark.parametrize("kind", [*EXACT, pa.string(), pa.int64()], ids=str)
def test_no_rows_are_no_ids(kind: pa.DataType) -> None:
    assert read(pa.array([], kind)) == IdHash().ids(pa.array([], kind)).to_pylist() == []


def test_a_hash_does_not_tell_seven_from_seven_point_zero() -> None:
    columns = [pa.array(["7"]), pa.array(["7.0"]), pa.array([7.0]), pa.array([7]), pa.array(["7"], pa.large_string())]
    assert len({tuple(IdHash().ids(column).to_pylist()) for column in columns}) == 1
    different = ["7", "07", "7.5", "7.0a", "a7.0"]
    assert len(set(IdHash().ids(pa.array(different)).to_pylist())) == len(different)
    for wrong in (pa.array([2.0**53]), pa.array([float("nan")]), pa.array(["9007199254740992.0"])):
        with pytest.raises(pa.ArrowInvalid):
            IdHash().ids(wrong)


SPELLINGS: dict[str, Any] = {
    "int64": lambda ids: pa.array(ids, pa.int64()),
    "uint64": lambda ids: pa.array(ids, pa.uint64()),
    "text": lambda ids: pa.array([str(each) for each in ids]),
    "large text": lambda ids: pa.array([str(each) for each in ids], pa.large_string()),
    "dictionary": lambda ids: pa.array([str(each) for each in ids]).dictionary_encode(),
    "text of floats": lambda ids: pa.array([f"{each}.0" for each in ids]),
    "float64": lambda ids: pa.array([float(each) for each in ids], pa.float64()),
    "float32": lambda ids: pa.array(np.array(ids, np.float32)),
}
LIMITS = {"text of floats": 2**53, "float64": 2**53, "float32": 2**24}
SIZES = st.one_of(*(st.integers(edge - 2, edge + 2) for edge in (2, 2**24, 2**53, 2**62)), st.integers(-5, 2**63 - 1))


def check_right_or_refused(spelling: str, ids: list[int]) -> None:
    ids = [each if spelling != "uint64" else abs(each) for each in ids]
    right = all(0 <= each < LIMITS.get(spelling, 2**63) for each in ids)
    values = SPELLINGS[spelling](ids)
    assert read(values) == (ids if right else None)
    try:
        hashed = IdHash().ids(values).to_pylist()
    except pa.ArrowInvalid:
        assert not right
    else:
        assert hashed == IdHash().ids(SPELLINGS["text"](ids)).to_pylist()


@given(st.sampled_from(list(SPELLINGS)), st.lists(SIZES, min_size=1, max_size=4))
@settings(max_examples=500, deadline=None)
def test_every_spelling_is_right_or_refused(spelling: str, ids: list[int]) -> None:
    check_right_or_refused(spelling, ids)


@pytest.mark.slow
@given(st.sampled_from(list(SPELLINGS)), st.lists(SIZES, min_size=1, max_size=4))
@settings(max_examples=100_000, deadline=None)
def test_every_spelling_is_right_or_refused_at_length(spelling: str, ids: list[int]) -> None:
    check_right_or_refused(spelling, ids)


def test_truth_and_numbers_may_be_mixed() -> None:
    assert numbers(pa.array(["true", "0", None, "False", "2.5"])).to_pylist() == [1, 0, 0, 0, 2.5]
