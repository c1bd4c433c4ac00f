"""Tables of a dataset are read in bounded memory, and a file that is not what it says is refused in one line."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.console.errors import UserError
from trainer.data.format import parquet_files
from trainer.data.format.dataset_files import DatasetFiles
from trainer.data.format.parquet_files import open_table, read_table
from trainer.runtime.checksums import write_checksums

TABLE = pa.table(
    {
        "id": np.arange(1000),
        "text": [f"text {n % 7}" for n in range(1000)],
        "list": [[n, n + 1] if n % 3 else [] for n in range(1000)],
        "share": np.linspace(0, 1, 1000, dtype=np.float32),
        "kind": pa.array(["a", "b", None] * 333 + ["a"]).dictionary_encode(),
    }
)


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lower the limits, so that a bomb of this test can be small."""
    monkeypatch.setattr(parquet_files, "_SMALL_BYTES", 1 << 20)


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd", "brotli", "lz4"])
@pytest.mark.parametrize("group", [100, 1000])
def test_a_table_is_read_as_it_was_written(tmp_path: Path, compression: str, group: int) -> None:
    pq.write_table(TABLE, tmp_path / "table.parquet", compression=compression, row_group_size=group)
    for checked in (False, True):
        if checked:
            write_checksums(tmp_path)
        assert read_table(DatasetFiles(tmp_path), "table.parquet").equals(TABLE)
        some = read_table(DatasetFiles(tmp_path), "table.parquet", ["share", "text"])
        assert some.equals(TABLE.select(["share", "text"]))
    pq.write_table(TABLE.slice(0, 0), tmp_path / "empty.parquet")
    assert read_table(DatasetFiles(tmp_path), "empty.parquet").schema == TABLE.schema


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    files = DatasetFiles(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_table(files, "table.parquet")
    (tmp_path / "table.parquet").write_bytes(b"PAR1nonsensePAR1")
    with pytest.raises(UserError, match=r"table\.parquet: not a readable Parquet file"):
        read_table(files, "table.parquet")
    pq.write_table(TABLE, tmp_path / "table.parquet")
    with pytest.raises(UserError, match=r"table\.parquet: column 'other' is missing"):
        read_table(files, "table.parquet", ["other"])
    (tmp_path / "table.parquet").unlink()
    os.mkfifo(tmp_path / "table.parquet")
    for reader in (lambda: read_table(files, "table.parquet"), lambda: open_table(files, "table.parquet").__enter__()):
        with pytest.raises(UserError, match="not a regular file but a FIFO"):
            reader()


BOMBS = {
    "equal numbers": pa.table({"id": np.zeros(4_000_000, np.int64)}),
    "empty texts": pa.table(
        {"text": pa.DictionaryArray.from_arrays(np.zeros(4_000_000, np.int32), [""]).cast("string")}
    ),
    "one long text": pa.table(
        {
            "text": pa.DictionaryArray.from_arrays(np.zeros(40_000, np.int32), ["x" * 100_000])
            .slice(0, 400)
            .cast("string")
        }
    ),
    "one long list": pa.table({"list": [np.zeros(4_000_000, np.int64)]}),
    "long bytes": pa.table({"bytes": pa.array([b"\0" * 40_000_000])}),
}


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
@pytest.mark.parametrize("what", BOMBS)
def test_a_small_file_that_fills_the_memory_is_refused(
    tmp_path: Path, small_limit: None, what: str, compression: str
) -> None:
    file = tmp_path / "table.parquet"
    pq.write_table(BOMBS[what], file, compression=compression)
    assert 1000 * file.stat().st_size < BOMBS[what].nbytes
    write_checksums(tmp_path)
    with pytest.raises(UserError, match=r"table\.parquet: needs more than .* of memory") as refused:
        read_table(DatasetFiles(tmp_path), "table.parquet")
    assert "\n" not in str(refused.value)


def test_a_text_that_every_row_names_takes_no_memory(tmp_path: Path) -> None:
    # 100,000 rows of 10 MB would be a terabyte; the file is made without it, by a dictionary of one text.
    texts = pa.DictionaryArray.from_arrays(np.zeros(100_000, np.int32), ["x" * 10_000_000])
    pq.write_table(pa.table({"text": texts}), tmp_path / "table.parquet", compression="zstd", store_schema=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="of memory"):
        read_table(DatasetFiles(tmp_path), "table.parquet")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1), value=st.binary(min_size=1, max_size=12))
def test_any_bytes_give_a_table_or_one_line(tmp_path: Path, place: float, value: bytes) -> None:
    pq.write_table(TABLE, tmp_path / "whole.parquet")
    data = bytearray((tmp_path / "whole.parquet").read_bytes())
    at = int(place * (len(data) - 1))
    data[at : at + len(value)] = value
    (tmp_path / "table.parquet").write_bytes(data)
    try:
        read_table(DatasetFiles(tmp_path), "table.parquet")
    except UserError as error:
        assert re.fullmatch(r".*table\.parquet: .*", str(error))
