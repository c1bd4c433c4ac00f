"""Tests of logs with one cell replaced by another text: the import works, or one line names the file and the row."""

from __future__ import annotations

import csv
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.importers import test_events, test_kuaicomt, test_kuailive, test_kuailive_m3, test_kuairand
from trainer.console.errors import UserError
from trainer.data.importers.events import import_events
from trainer.data.importers.kuaicomt import import_kuaicomt
from trainer.data.importers.kuailive import import_kuailive
from trainer.data.importers.kuailive_m3 import import_kuailive_m3
from trainer.data.importers.kuairand import import_kuairand

CELLS = st.one_of(
    st.sampled_from(
        ["", "NULL", r"\N", "NA", "nan", "inf", "-1", "0", "1.0", "01", "1e300", "9223372036854775807", "1e-07"]
    ),
    st.sampled_from(
        ["9007199254740993.0", "4611686018427387904", "2147483648", "True", "t", "yes", "1,5", "2022-05-04", " 7 "]
    ),
    st.integers(-(1 << 65), 1 << 65).map(str),
    st.floats().map(repr),
    st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), max_size=4),
)


def write_own_log(folder: Path, mapping: str, lines: str) -> Path:
    """Write a log of one's own, its mapping and its table of users."""
    test_events.write(folder, mapping, lines)
    return folder


def import_own_log(src: Path, out: Path, partitions: int) -> Any:
    return import_events(src / "log", out, src / "map.toml", partitions)


T0 = test_events.T0
SOURCES: dict[str, tuple[Callable[[Path], Path], Callable[[Path, Path, int], Any]]] = {
    "exposures": (
        lambda folder: write_own_log(folder, test_events.EXPOSURES, test_events.EXPOSURE_LINES),
        import_own_log,
    ),
    "events": (
        lambda folder: write_own_log(
            folder,
            test_events.EVENTS,
            f"user,author,item,time,action,amount\n1,2,3,{T0},show,\n1,2,3,{T0 + 5},gift,3\n1,2,3,{T0 + 9},leave,9\n",
        ),
        import_own_log,
    ),
    "kuairand": (lambda folder: test_kuairand.write_version(folder, "pure"), import_kuairand),
    "kuailive": (test_kuailive.write_source, import_kuailive),
    "kuaicomt": (test_kuaicomt.write, import_kuaicomt),
    "kuailive_m3": (test_kuailive_m3.write_source, import_kuailive_m3),
}


def replace_cell(file: Path, row: int, column: int, cell: str) -> None:
    """Replace a cell of a table; the texts of a Parquet file stand for its values."""
    if file.name.endswith(".parquet"):
        table = pq.read_table(file)
        name = table.column_names[column % table.num_columns]
        if pa.types.is_list(table.schema.field(name).type):
            return
        texts = [None if value is None else str(value) for value in table[name].to_pylist()]
        texts[row % len(texts)] = cell
        pq.write_table(table.set_column(table.column_names.index(name), name, pa.array(texts, pa.string())), file)
        return
    with open(file, newline="") as opened:
        lines = list(csv.reader(opened))
    line = lines[1 + row % (len(lines) - 1)]
    line[column % len(line)] = cell
    with open(file, "w", newline="") as opened:
        csv.writer(opened).writerows(lines)


def check_cell(folder: Path, source: str, place: tuple[int, int, int], cell: str) -> None:
    """Import a source with one cell replaced."""
    write, import_source = SOURCES[source]
    write(folder / "src")
    files = sorted(file for file in (folder / "src").rglob("*") if file.name.endswith((".csv", ".parquet")))
    replace_cell(files[place[0] % len(files)], place[1], place[2], cell)
    try:
        import_source(folder / "src", folder / "out", 1)
    except UserError as error:
        message = str(error)
        assert "\n" not in message and re.match(
            rf"{re.escape(str(folder / 'src'))}/\S+: (row|line) [0-9]+: ", message
        ), message
        assert not (folder / "out").exists()


PLACES = st.tuples(st.integers(0, 12), st.integers(0, 5), st.integers(0, 40))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([*SOURCES]), PLACES, CELLS)
def test_a_cell_is_read_or_named(source: str, place: tuple[int, int, int], cell: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check_cell(Path(folder), source, place, cell)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([*SOURCES]), PLACES, CELLS)
def test_a_cell_is_read_or_named_at_length(source: str, place: tuple[int, int, int], cell: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check_cell(Path(folder), source, place, cell)
