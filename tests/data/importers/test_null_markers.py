"""Tests of null markers: the columns to which they apply, their defaults, and the keys that change them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.importers.test_events import EXPOSURE_LINES, EXPOSURES, T0, rows_of, write
from trainer.console.errors import UserError
from trainer.data.importers import field_parsers
from trainer.data.importers.columns import read_column_batches
from trainer.data.importers.events import import_events
from trainer.data.importers.null_markers import VALUE_NULLS, NullMarkers, without_markers

HASHED = EXPOSURES.replace("[columns]", 'hash_ids = ["user_id", "item_id"]\n[columns]', 1)


def as_parquet(arguments: dict[str, Any]) -> None:
    """Replace the log by a Parquet file of the same texts."""
    file = arguments["src"] / "a.csv"
    names = file.read_text().splitlines()[0].split(",")
    options = pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
    pq.write_table(pa.csv.read_csv(file, convert_options=options), arguments["src"] / "a.parquet")
    file.unlink()


@pytest.mark.parametrize("parquet", [False, True])
def test_markers_are_no_value_in_features_and_outcomes(tmp_path: Path, parquet: bool) -> None:
    header, _, _, last = EXPOSURE_LINES.splitlines()
    lines = [f"{10 + n},70,700,{T0 + n},0,v,{','.join([marker] * 6)}" for n, marker in enumerate(VALUE_NULLS)]
    users = "uid,city,age\n8,Rome,1\n" + "".join(f"{10 + n},{one},{one}\n" for n, one in enumerate(VALUE_NULLS))
    arguments = write(tmp_path, EXPOSURES, "\n".join([header, *lines, last.replace("70,702", "72,702"), ""]), users)
    if parquet:
        as_parquet(arguments)
    spec, rows = import_events(**arguments), rows_of(tmp_path / "out")
    assert spec.extra["vocabularies"] == {"city": ["Rome"], "tab": ["hot"]}
    assert rows["label"].tolist() == [*([[0, 0, 0]] * len(VALUE_NULLS)), [1, 0, 1]]
    assert rows["side"].tolist() == [*([[0, 0]] * len(VALUE_NULLS)), [1, 1]]
    assert rows["dense"].tolist() == [*([[0, 0]] * len(VALUE_NULLS)), [1, 1]]


@pytest.mark.parametrize("parquet", [False, True])
def test_users_and_items_may_have_the_names_of_markers(tmp_path: Path, parquet: bool) -> None:
    names = [marker for marker in VALUE_NULLS if marker != r"\N"]
    lines = [f"{name},70,{name},{T0 + n},0,v,1,0,0,0,home,1" for n, name in enumerate(names)]
    users = "uid,city,age\n" + "".join(f"{name},city{n:02},0\n" for n, name in enumerate(names))
    arguments = write(tmp_path, HASHED, "\n".join([EXPOSURE_LINES.splitlines()[0], *lines, ""]), users)
    if parquet:
        as_parquet(arguments)
    spec, rows = import_events(**arguments), rows_of(tmp_path / "out")
    expected = field_parsers.IdHash().ids(pa.array(names)).to_pylist()
    assert rows["user_id"].tolist() == rows["item_id"].tolist() == expected
    assert spec.ids["user"].count == spec.ids["item"].count == len(names)
    assert rows["side"][:, 0].tolist() == list(range(1, len(names) + 1))


@pytest.mark.parametrize("parquet", [False, True])
@pytest.mark.parametrize("name", [r"\N", "", "  "])
def test_a_text_that_is_no_id_is_refused(tmp_path: Path, name: str, parquet: bool) -> None:
    arguments = write(tmp_path, HASHED, EXPOSURE_LINES.replace("\n7,71", f"\n{name},71"))
    if parquet:
        as_parquet(arguments)
    with pytest.raises(UserError) as refused:
        import_events(**arguments)
    assert f"row 2: column 'uid' is {'empty' if not name else repr(name)}; it must be a text" in str(refused.value)


def test_markers_can_be_chosen_for_all_columns_and_for_one(tmp_path: Path) -> None:
    lines = EXPOSURE_LINES.replace(",home,", ",NA,").replace(",hot,", ",-,").replace("0.5", "?")
    users = "uid,city,age\n7,NA,?\n8,-,2\n"
    chosen = '\n[nulls]\nvalues = ["?", "-"]\nids = ["7"]\ncolumns = {uid = ["9"], city = ["NA"]}\n'
    spec = import_events(**write(tmp_path, HASHED + chosen, lines, users))
    assert spec.extra["vocabularies"] == {"city": ["-"], "tab": ["NA"]}
    assert rows_of(tmp_path / "out")["dense"].tolist() == [[0, 0], [0, 0], [2, 1]]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ('[nulls]\ncolumns = {town = ["-"]}', "nulls.columns has 'town', which is no column of this mapping"),
        ('[nulls]\nvalue = ["-"]', "unknown key nulls.value; .* nulls.values"),
        ('[nulls]\nids = "-"', "nulls.ids"),
    ],
)
def test_a_mistake_in_the_markers_is_named(tmp_path: Path, more: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"map\.toml: .*{message}") as refused:
        import_events(**write(tmp_path, f"{EXPOSURES}\n{more}\n", EXPOSURE_LINES))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_a_text_is_text(tmp_path: Path, kind: pa.DataType) -> None:
    texts = ["null", "NA", "NaN", "", None, " two ", r"\N"]
    pq.write_table(pa.table({"text": pa.array(texts).cast(kind)}), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("n,text\n" + "".join(f"1,{text or ''}\n" for text in texts))
    for file in (tmp_path / "a.parquet", tmp_path / "a.csv"):
        (batch,) = read_column_batches(file, {"text": None})
        assert batch.text("text").to_pylist() == [text or "" for text in texts]


FLOATS = [("a.csv", "nan"), ("a.csv", ""), ("a.csv", "NaN"), ("a.parquet", float("nan")), ("a.parquet", None)]


def numbers_of(folder: Path, name: str, value: Any) -> np.ndarray:
    """Return a column of 2.5 and a value as numbers."""
    if name == "a.csv":
        (folder / name).write_text(f"y,x\n1,2.5\n1,{value}\n")
    else:
        pq.write_table(pa.table({"x": pa.array([2.5, value], pa.float64())}), folder / name)
    (batch,) = read_column_batches(folder / name, {"x": None})
    return batch.small_numbers("x")


@pytest.mark.parametrize(("name", "value"), FLOATS)
def test_nan_is_a_missing_value_in_every_format(tmp_path: Path, name: str, value: Any) -> None:
    assert numbers_of(tmp_path, name, value).tolist() == [2.5, 0]


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 1e300])
def test_a_number_that_no_feature_holds_is_refused_in_every_format(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"{name}: row 2: column 'x' is .*; it must be a"):
        numbers_of(tmp_path, name, value)


def test_truth_values_of_databases_are_numbers() -> None:
    read = field_parsers.numbers(pa.array(["t", "f", "true", "False", " 1 ", r"\N"]))
    assert read.to_pylist() == [1, 0, 1, 0, 1, 0]


CELLS = st.one_of(
    st.sampled_from(["1", "1.0", " 7", "1,5", "1 000", "1_0", "0x1F", "inf", "-inf", "nan", "t", "yes", "1e400", "-3"]),
    st.sampled_from(VALUE_NULLS),
    st.floats().map(repr),
    st.integers().map(str),
    st.text(max_size=3),
)


def check_number(cell: str, nulls: tuple[str, ...]) -> None:
    """Check that a text is read as its number, or refused."""
    try:
        (found,) = field_parsers.numbers(pa.array([cell]), nulls).to_pylist()
    except pa.ArrowInvalid:
        return
    trimmed = cell.strip(" \t\r\n\v\f")
    if trimmed in ("", *nulls) or trimmed.lower().lstrip("+-") == "nan":
        assert found == 0
    else:
        truths = dict.fromkeys(("t", "true", "True", "TRUE"), 1.0) | dict.fromkeys(
            ("f", "false", "False", "FALSE"), 0.0
        )
        assert found == (truths[trimmed] if trimmed in truths else float(trimmed.replace("_", "x")))


NULLS = st.sampled_from([VALUE_NULLS, (), ("7", "1.0"), ("nan",)])


@settings(max_examples=500, deadline=None)
@given(CELLS, NULLS)
def test_a_number_is_right_or_refused(cell: str, nulls: tuple[str, ...]) -> None:
    check_number(cell, nulls)


@pytest.mark.slow
@settings(max_examples=100_000, deadline=None)
@given(CELLS, NULLS)
def test_a_number_is_right_or_refused_at_length(cell: str, nulls: tuple[str, ...]) -> None:
    check_number(cell, nulls)


def test_columns_without_text_have_no_markers() -> None:
    values = pa.array([1, None])
    assert without_markers(values, ("1",)) is values
    markers = NullMarkers(columns={"x": ("-",)})
    assert (markers.of_value("x"), markers.of_id("x"), markers.of_id("y")) == (("-",), ("-",), (r"\N",))
