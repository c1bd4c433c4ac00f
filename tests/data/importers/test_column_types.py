"""Tests of columns of every Arrow type in every place of a mapping: the value is right, or the error is one line."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.console.errors import UserError
from trainer.data.importers.category_codes import vocabulary
from trainer.data.importers.columns import ColumnBatch, read_column_batches
from trainer.data.importers.events import import_events
from trainer.data.importers.field_parsers import IdHash, codes
from trainer.data.importers.table_files import python_value

INTEGERS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]
FLOATS = [pa.float16(), pa.float32(), pa.float64()]
DECIMALS = [pa.decimal32(9, 2), pa.decimal64(18, 0), pa.decimal128(38, 3), pa.decimal256(60, 1)]
TEXTS = [pa.string(), pa.large_string(), pa.string_view(), pa.json_(pa.string())]
BINARIES = [pa.binary(), pa.large_binary(), pa.binary_view()]
CALENDAR = [
    *(pa.date32(), pa.date64(), pa.time32("s"), pa.time64("ns")),
    *(pa.timestamp(unit, zone) for unit in ("s", "ms", "us", "ns") for zone in (None, "Asia/Shanghai")),
]
READ = [pa.bool_(), pa.null(), *INTEGERS, *FLOATS, *DECIMALS, *TEXTS, *BINARIES, *CALENDAR]
WRAPPED = [
    *(pa.dictionary(pa.int32(), kind) for kind in (pa.string(), pa.int64(), pa.float64(), pa.timestamp("ms"))),
    pa.binary(2),
]
REFUSED = [
    *(pa.duration(unit) for unit in ("s", "ms", "us", "ns")),
    pa.list_(pa.int64()),
    pa.large_list(pa.string()),
    pa.list_(pa.float32(), 2),
    pa.struct([("a", pa.int64()), ("b", pa.string())]),
    pa.map_(pa.string(), pa.int64()),
    pa.fixed_shape_tensor(pa.float32(), [2]),
]
NUMBERS = st.one_of(
    st.integers(-3, 1 << 70),
    st.sampled_from([0, 1, 7, 2**53, 2**63, 1_650_000_000_000]),
    st.floats(width=32),
    st.just(float("nan")),
    st.decimals(-9, 10**9, places=1),
)
VALUES = st.one_of(
    NUMBERS,
    st.none(),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.sampled_from(
        ["1", "7.0", "true", "2022-05-04", "2022-05-04 00:00:00+00", "NaN", b"\xff\xfe", b"ok", True, False]
    ),
    st.dates(),
    st.datetimes(),
    st.times(),
    st.timedeltas(),
    st.lists(st.integers(0, 9), max_size=2),
    st.fixed_dictionaries({"a": st.integers(0, 9)}),
)


def column_of(kind: pa.DataType, values: list[Any]) -> pa.Array:
    """Return those of the values that fit the type, as an array of it."""
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, column_of(kind.storage_type, values))
    if pa.types.is_dictionary(kind):
        return column_of(kind.value_type, values).dictionary_encode()
    kept: list[Any] = []
    for value in values:
        try:
            pa.array([*kept, value], kind)
        except (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError):
            continue
        kept.append(value)
    return pa.array(kept, kind)


def write(path: Path, column: pa.Array) -> None:
    """Write a Parquet file of a column ``x``."""
    pq.write_table(pa.table({"x": column}), path)


def batch_of(path: Path, column: pa.Array) -> ColumnBatch:
    """Write a Parquet file of a column ``x``; return its only batch, as importers read it."""
    write(path, column)
    (batch,) = read_column_batches(path, {"x": None})
    return batch


def category(batch: ColumnBatch) -> np.ndarray:
    """Return the codes of a column as a side feature."""
    return batch.codes("x", vocabulary(batch.categories("x")))


PLACES: dict[str, Callable[[ColumnBatch], Any]] = {
    "id": lambda batch: batch.ids("x"),
    "hashed id": lambda batch: batch.convert("x", IdHash().ids, "a text"),
    "number": lambda batch: batch.numbers("x"),
    "milliseconds": lambda batch: batch.milliseconds("x"),
    "time": lambda batch: batch.times("x", "Asia/Shanghai"),
    "name": lambda batch: batch.convert("x", lambda values: codes(values, ["1", "true", "ok"]), "one of 1, true, ok"),
    "category": category,
}


def check_right(place: str, values: list[Any], found: Any) -> None:
    """Check the results of a column in a place against its Python values."""
    assert len(found) == len(values)
    for value, result in zip(values, found.tolist(), strict=True):
        if place == "id":
            assert not isinstance(value, bool | datetime.date)
            assert result == int(Decimal(value.decode() if isinstance(value, bytes) else str(value).strip()))
        elif place in ("number", "milliseconds") and not isinstance(value, str | bytes):
            number = 0.0 if value is None or value != value else float(value)
            assert result == pytest.approx(number if place == "number" else int(number), rel=1e-6)
        elif place == "time":
            assert 946_684_800_000 <= result < 4_102_444_800_000
            if isinstance(value, datetime.datetime) and value.tzinfo is not None:
                assert abs(result - value.timestamp() * 1000) <= 1
        elif place == "category":
            same = [other for other, code in zip(values, found.tolist(), strict=True) if code == result]
            assert result == 0 or all(str(other) == str(value) or other == value for other in same)


def check(path: Path, kind: pa.DataType, values: list[Any], place: str) -> None:
    column = column_of(kind, values)
    # Arrow has no batch for a file without rows.
    if not len(column):
        return
    try:
        write(path, column)
    except pa.ArrowException:
        # Parquet has no place for some times.
        return
    try:
        (batch,) = read_column_batches(path, {"x": None})
        found = PLACES[place](batch)
    except UserError as error:
        message = str(error)
        assert message.startswith(f"{path}: ") and "column 'x'" in message and "\n" not in message
        assert len(message) < 900 and ("accepted are" in message or "must be" in message)
        return
    assert kind not in REFUSED
    # Python has no nanoseconds.
    if "ns" not in str(kind):
        check_right(place, [python_value(value) for value in batch.column("x")], found)


@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from([*READ, *WRAPPED, *REFUSED]), st.lists(VALUES, min_size=1, max_size=4), st.sampled_from([*PLACES])
)
def test_any_type_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, kind: pa.DataType, values: list[Any], place: str
) -> None:
    check(tmp_path_factory.getbasetemp() / "any.parquet", kind, values, place)


@pytest.mark.slow
@settings(max_examples=100_000, deadline=None)
@given(
    st.sampled_from([*READ, *WRAPPED, *REFUSED]), st.lists(VALUES, min_size=1, max_size=4), st.sampled_from([*PLACES])
)
def test_many_columns_of_any_type_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, kind: pa.DataType, values: list[Any], place: str
) -> None:
    check(tmp_path_factory.getbasetemp() / "many.parquet", kind, values, place)


@pytest.mark.parametrize("kind", REFUSED, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_types_that_cannot_be_read(tmp_path: Path, kind: pa.DataType, place: str) -> None:
    storage = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    values = pa.nulls(2, storage)
    column = pa.ExtensionArray.from_storage(kind, values) if storage is not kind else values
    with pytest.raises(UserError) as refused:
        PLACES[place](batch_of(tmp_path / "a.parquet", column))
    assert "column 'x' has the type " in str(refused.value) and "accepted are text, " in str(refused.value)


@pytest.mark.parametrize(
    ("place", "kind"),
    [("id", pa.bool_()), ("id", pa.timestamp("ms")), ("number", pa.timestamp("s")), ("time", pa.bool_())],
    ids=str,
)
def test_types_that_would_be_misread(tmp_path: Path, place: str, kind: pa.DataType) -> None:
    column = pa.array([True]) if kind == pa.bool_() else pa.array([1], pa.int32()).cast(pa.int64()).cast(kind)
    with pytest.raises(UserError, match=r"column 'x' has the type .*; accepted are "):
        PLACES[place](batch_of(tmp_path / "a.parquet", column))


MAPPING = """
layout = "exposures"
[columns]
user_id = "user"
author_id = "author"
item_id = "item"
time = "time"
[domain]
constant = "live"
[behaviours]
click = {column = "click"}
[features]
context = {side = ["tab"], dense = ["battery"]}
"""


@pytest.mark.parametrize("name", ["user", "time", "click", "tab", "battery"])
def test_an_import_names_file_column_and_type(tmp_path: Path, name: str) -> None:
    log = {"user": [1], "author": [2], "item": [3], "time": [1_650_000_000_000], "click": [1]}
    log |= {"tab": ["a"], "battery": [0.5]}
    (tmp_path / "map.toml").write_text(MAPPING)
    for column, kind in (
        (pa.array([[1, 2]]), "list<element: int64>"),
        (pa.array([{"a": 1}]), "struct<a: int64>"),
    ):
        table = pa.table({**log, name: column})
        pq.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(UserError) as refused:
            import_events(tmp_path / "a.parquet", tmp_path / "out", tmp_path / "map.toml")
        assert f"a.parquet: column {name!r} has the type {kind}, which cannot be read" in str(refused.value)
        assert not (tmp_path / "out").exists()


def test_a_column_name_that_comes_twice(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"])
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("x,x\n1,2\n")
    for name in ("a.parquet", "a.csv"):
        with pytest.raises(UserError, match="2 columns have the name 'x'; only one may have it"):
            list(read_column_batches(tmp_path / name, {"x": None}))
