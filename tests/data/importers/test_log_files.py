"""Tests of the files of a log: patterns, partition columns in their paths, and files that are left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.importers.test_events import T0, rows_of
from trainer.console.errors import UserError
from trainer.data.importers.columns import read_column_batches
from trainer.data.importers.events import import_events
from trainer.data.importers.log_files import find_log_files, partition_of

DAY_MS = 86_400_000
MAPPING = """
layout = "exposures"
files = "**/*"
[columns]
user_id = "user"
author_id = "author"
item_id = "item"
time = "ts"
[domain]
constant = "live"
[behaviours]
click = {column = "click"}
[features]
context = {side = ["country"], dense = ["hour"]}
"""
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


def write_part(file: Path, columns: dict[str, list[Any]] | pa.Table) -> None:
    """Write a part of a log as CSV or Parquet, by the name of the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    if file.name.endswith(".parquet"):
        pq.write_table(table, file)
        return
    lines = [",".join(table.column_names), *(",".join(map(str, line.values())) for line in table.to_pylist())]
    file.write_text("\n".join(lines) + "\n")


def lines_of(first: int) -> dict[str, list[Any]]:
    """Return two lines of a log."""
    return {"user": [first, first + 1], "author": [1, 1], "item": [first, first], "ts": [T0, T0 + 1], "click": [0, 1]}


def import_folder(folder: Path, mapping: str = MAPPING) -> dict[str, Any]:
    """Import the folder ``log``, and return the rows of the dataset."""
    (folder / "map.toml").write_text(mapping)
    import_events(folder / "log", folder / "out", folder / "map.toml", partitions=1)
    return rows_of(folder / "out")


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_partition_columns_are_columns(tmp_path: Path, ending: str) -> None:
    for first, folder in ((10, "country=Cote d%27Ivoire%2FA/hour=03"), (20, f"country={NO_VALUE}/hour=14")):
        write_part(tmp_path / "log" / folder / f"part-0.{ending}", lines_of(first))
    rows = import_folder(tmp_path)
    assert rows["user_id"].tolist() == [10, 11, 20, 21]
    assert rows["side"].tolist() == [[1], [1], [0], [0]]
    assert rows["dense"].tolist() == [[3], [3], [14], [14]]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_partition_column_may_be_the_time_an_id_or_a_domain(tmp_path: Path, ending: str) -> None:
    mapping = MAPPING.replace('"ts"', '"dt"').replace('"author"', '"anchor"')
    mapping = mapping.replace('constant = "live"', 'column = "kind"\nvideo = ["1"]\nlive = ["2"]')
    mapping = mapping.replace("[columns]", 'hash_ids = ["user_id"]\n[columns]', 1).replace('"user"', '"name"')
    mapping = mapping.replace('side = ["country"], dense = ["hour"]', "")
    for item, day, kind, name in ((1, "2022-05-04 01%3A00%3A00", "02", "NULL"), (2, "2022-05-05", "1.0", "%4eULL")):
        file = tmp_path / "log" / f"dt={day}" / f"kind={kind}/anchor=9/name={name}" / f"a.{ending}"
        write_part(file, lines_of(item))
    with pytest.raises(UserError, match="column 'kind' is '02'; it must be one of 1, 2"):
        import_folder(tmp_path, mapping)
    rows = import_folder(tmp_path, mapping.replace('"2"', '"02"'))
    assert rows["author_id"].tolist() == [9] * 4 and rows["domain"].tolist() == [1, 1, 0, 0]
    assert len(set(rows["user_id"].tolist())) == 1
    midnight = 1_651_622_400_000
    assert rows["request_ms"].tolist() == [midnight + 3_600_000] * 2 + [midnight + DAY_MS] * 2


def test_a_pattern_that_matches_nothing_names_the_one_that_would(tmp_path: Path) -> None:
    for day in (4, 5):
        write_part(tmp_path / "log" / f"dt=2022-05-0{day}" / "part-0.parquet", lines_of(1))
    with pytest.raises(UserError) as refused:
        import_folder(tmp_path, MAPPING.replace('files = "**/*"', ""))
    assert str(refused.value) == (
        f"{tmp_path}/log: no .csv, .csv.gz or .parquet file here that matches files = '*'; other names of tables "
        'there: 2, such as dt=2022-05-04/part-0.parquet: set files = "**/*.parquet" in the mapping'
    )
    write_part(tmp_path / "log" / "more" / "a.csv", lines_of(1))
    with pytest.raises(UserError, match=r'set files = "\*\*/\*" in the mapping'):
        import_folder(tmp_path, MAPPING.replace('files = "**/*"', ""))


@pytest.mark.parametrize("pattern", ["", "/tmp/*", "../*.csv", "a/../../b"])
def test_a_pattern_stays_in_the_folder(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "log").mkdir()
    with pytest.raises(UserError, match=r"map\.toml: files .*must be a pattern of paths below") as refused:
        import_folder(tmp_path, MAPPING.replace("**/*", pattern))
    assert "\n" not in str(refused.value)


def test_hidden_files_are_left_out_and_others_are_named(tmp_path: Path) -> None:
    for name in ("_temporary/0/a.csv", ".hive-staging/a.csv", "b/.a.csv.crc", "_SUCCESS", "_day=1/a.csv", "a.csv"):
        write_part(tmp_path / name, lines_of(1))
    (tmp_path / "b.tsv").write_text("x\n")
    (tmp_path / "folder.parquet").mkdir()
    found = find_log_files(tmp_path, "**/*", set())
    assert [file.name for file in found.read] == ["_day=1/a.csv", "a.csv"] and found.left_out == ("b.tsv",)
    assert [file.name for file in find_log_files(tmp_path, "*", set()).read] == ["a.csv"]
    assert find_log_files(tmp_path, "*", set()).left_out == ("_day=1/a.csv", "b.tsv")


def test_the_folder_itself_may_be_a_partition(tmp_path: Path) -> None:
    write_part(tmp_path / "dt=1" / "hour=2" / "a.csv", lines_of(1))
    for source in (tmp_path / "dt=1", tmp_path / "dt=1" / "hour=2", tmp_path / "dt=1" / "hour=2" / "a.csv"):
        (file,) = find_log_files(source, "**/*", set()).read
        assert file.partition == {"dt": "1", "hour": "2"}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("a=1/b=2/a=3/x.csv", r"the path has two values of 'a': '1' and '3'"),
        ("a=%FF/x.csv", r"the folder 'a=%FF' is not UTF-8"),
    ],
)
def test_a_path_that_contradicts_itself_is_refused(tmp_path: Path, path: str, message: str) -> None:
    write_part(tmp_path / path, lines_of(1))
    with pytest.raises(UserError, match=message):
        find_log_files(tmp_path, "**/*", set())


AGREE = [
    (pa.array([3, 3]), "03", True),
    (pa.array(["3", "03"]), "3", True),
    (pa.array([3, 4]), "3", False),
    (pa.array([3, None]), "3", False),
    (pa.array([None, None], pa.string()), None, True),
    (pa.array([3.0]), "3", True),
    (pa.array(["2022-05-04"]).cast(pa.date32()), "2022-05-04", True),
    (pa.array(["2022-05-04"]).cast(pa.timestamp("us")), "2022-05-04", True),
    (pa.array(["2022-05-04"]).cast(pa.timestamp("us")), "2022-05-05", False),
    (pa.array(["a"]), "b", False),
    (pa.array([True]), "true", True),
]


@pytest.mark.parametrize(("values", "text", "agree"), AGREE)
def test_a_column_in_the_file_and_in_the_path_must_agree(
    tmp_path: Path, values: pa.Array, text: str | None, agree: bool
) -> None:
    file = tmp_path / f"k={NO_VALUE if text is None else text}" / "a.parquet"
    write_part(file, pa.table({"k": values, "other": pa.array([[1]] * len(values))}))
    if agree:
        (batch,) = read_column_batches(file, {"k": None}, partition={"k": text})
        assert batch.column("k").equals(values)
        return
    with pytest.raises(UserError, match=rf"a\.parquet: row {len(values)}: column 'k' is .*as in the path of the file"):
        list(read_column_batches(file, {"k": None}, partition={"k": text}))
    # A column that the mapping does not use may differ.
    (batch,) = read_column_batches(file, {"p": None}, partition={"k": text, "p": "1"})
    assert batch.column("p").to_pylist() == ["1"] * len(values)


def test_a_column_that_only_some_files_have_is_named(tmp_path: Path) -> None:
    write_part(tmp_path / "log" / "hour=1" / "country=a" / "a.csv", lines_of(1))
    write_part(tmp_path / "log" / "hour=2" / "b.csv", lines_of(1))
    with pytest.raises(UserError, match=r"hour=2/b\.csv: column 'country' is missing; there are user, .*click, hour$"):
        import_folder(tmp_path)


KEYS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6)


def check_round_trip(values: dict[str, str], plain: bool) -> None:
    """Check that percent-encoded keys and values of a path are read again."""
    safe = "" if plain else " '(),;:@&+$!~*"
    parts = [f"{quote(key, safe='')}={quote(value, safe=safe)}" for key, value in values.items()]
    source = Path("/log")
    found = partition_of(source.joinpath(*parts, "a.csv"), source)
    assert found == {key: None if value == NO_VALUE else value for key, value in values.items()}


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(KEYS, KEYS, max_size=3), st.booleans())
def test_names_of_partitions_are_decoded(values: dict[str, str], plain: bool) -> None:
    check_round_trip(values, plain)


@pytest.mark.slow
@settings(max_examples=100_000, deadline=None)
@given(st.dictionaries(KEYS, KEYS, max_size=3), st.booleans())
def test_names_of_partitions_are_decoded_at_length(values: dict[str, str], plain: bool) -> None:
    check_round_trip(values, plain)
