"""Tests of reading tables in batches: a CSV file gives the values of a Parquet file with the same texts."""

from __future__ import annotations

import csv
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer.console.errors import UserError
from trainer.data.importers.table_files import read_batches

CELLS = st.one_of(
    st.sampled_from(
        ["", " ", "\x0c", "\x0b", "\t", "NULL", " NULL ", r"\N", " 7 ", "\x0c7", "+7", "0x1F", "1e3", "7.0"]
    ),
    st.integers(-(1 << 65), 1 << 65).map(str),
    st.text(st.sampled_from(" \x0c\x0b\x1f\u00a07-."), max_size=3),
)
TYPES: list[pa.DataType] = [pa.int64(), pa.float64(), pa.string()]


def read(file: Path, kind: pa.DataType) -> list[object] | str:
    """Return the values of column a, or the message without the name of the file."""
    try:
        return [value for batch in read_batches(file, {"a": kind}, block_bytes=64) for value in batch[0].to_pylist()]
    except UserError as error:
        return str(error).replace(str(file), "FILE")


@settings(max_examples=150, deadline=None)
@given(st.lists(CELLS, min_size=1, max_size=12), st.sampled_from(TYPES))
@example(["1"] * 40 + ["\x0c"], pa.int64())
@example(["1"] * 40 + ["\x0c", "x"], pa.int64())
def test_a_csv_file_gives_the_values_of_a_parquet_file(cells: list[str], kind: pa.DataType) -> None:
    with tempfile.TemporaryDirectory() as folder:
        text, table = Path(folder) / "a.csv", Path(folder) / "a.parquet"
        with open(text, "w", newline="") as stream:
            csv.writer(stream, quoting=csv.QUOTE_ALL).writerows([["a", "b"], *([cell, "1"] for cell in cells)])
        pq.write_table(pa.table({"a": cells, "b": ["1"] * len(cells)}), table)
        found, expected = read(text, kind), read(table, kind)
        if isinstance(expected, str):
            assert isinstance(found, str) and found.split(":")[1] == expected.split(":")[1], "another row"
        else:
            assert found == expected


@pytest.mark.parametrize("cell", [" ", "\x0c", "\x0b  "])
def test_white_space_is_no_number(tmp_path: Path, cell: str) -> None:
    file = tmp_path / "log.csv"
    file.write_text("a,b\n" + "1,2\n" * 100 + f"{cell},2\n" + "3,2\n" * 100)
    assert read(file, pa.int64()) == [1] * 100 + [None] + [3] * 100


def test_an_error_after_a_slow_value_has_its_row(tmp_path: Path) -> None:
    file = tmp_path / "log.csv"
    file.write_text("a,b\n" + "1,2\n" * 100 + "\x0c,2\n" + "3,2\n" * 100 + "x,2\n")
    assert read(file, pa.int64()) == "FILE: row 202: column 'a' is 'x'; it must be int64"
