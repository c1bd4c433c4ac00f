"""Shards: rows that are written are read back, also by plain WebDataset, and an error names damaged records."""

from __future__ import annotations

import json
import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import safetensors.numpy
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.full_disk import files_of_at_most
from trainer.console.errors import UserError
from trainer.data.format.schema import DatasetSpec, DenseFeature, SideFeature, partition_of, row_columns
from trainer.data.format.shards import FOLDER, HOUR_MS, RowStore, ShardWriter, index_name, read_rows, write_rows

SPEC = DatasetSpec(
    name="t",
    source="",
    licence="",
    partitions=3,
    timezone="UTC",
    behaviours=("a", "b"),
    applies={"a": ("live",), "b": ("live",)},
    candidates=("live",),
    side=(SideFeature("x", "context", 9),),
    dense=(DenseFeature("y", "context"), DenseFeature("z", "context")),
    statistics=(("user",),),
)


def make_rows(seed: int, n: int, span: int = 5 * HOUR_MS):
    """Make rows with random content, in random order of time."""
    rng = np.random.default_rng(seed)
    rows = {}
    for name, (dtype, shape) in row_columns(SPEC).items():
        values = rng.integers(0, 250, (n, *shape))
        rows[name] = (values / 7 if dtype.kind == "f" else values).astype(dtype)
    rows["visit_id"] = rng.permutation(n).astype(np.int64)
    rows["request_ms"] = rng.integers(0, span, n)
    rows["emit_ms"] = rows["request_ms"] + rng.integers(0, span // 3, n)
    return rows


def in_order(rows, where) -> dict[str, np.ndarray]:
    """Return the selected rows ordered by partition, then emission, then request."""
    owner = partition_of(rows["user_id"], SPEC.partitions)
    order = np.lexsort((rows["request_ms"], rows["emit_ms"], owner))
    order = order[where[order]]
    return {**{name: column[order] for name, column in rows.items()}, "partition": owner[order]}


def same(left, right) -> None:
    assert set(left) == set(right)
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)
        assert left[name].dtype == right[name].dtype


@pytest.fixture
def stored(tmp_path):
    rows = make_rows(0, 500)
    write_rows(tmp_path, SPEC, rows, rows_per_record=32, records_per_shard=4)
    return tmp_path, rows


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 200), st.integers(1, 70), st.integers(1, 5))
def test_all_rows_come_back_in_emission_order(tmp_path_factory, seed, n, rows_per_record, records_per_shard):
    path = tmp_path_factory.mktemp("rows")
    rows = make_rows(seed, n)
    write_rows(path, SPEC, rows, rows_per_record=rows_per_record, records_per_shard=records_per_shard)
    same(read_rows(path, SPEC), in_order(rows, np.ones(n, bool)))
    store = RowStore(path, SPEC)
    for partition in range(SPEC.partitions):
        index = store.records(partition)
        for record in range(len(index.rows)):
            read = store.read(partition, record)
            assert 0 < len(read["emit_ms"]) == index.rows[record] <= rows_per_record
            for name in ("request", "emit"):
                times = read[f"{name}_ms"]
                assert (times.min(), times.max()) == (
                    getattr(index, f"{name}_min")[record],
                    getattr(index, f"{name}_max")[record],
                )
        shards = sorted(path.glob(f"rows/part-{partition:05d}-*.tar"))
        assert len(shards) == -(-len(index.rows) // records_per_shard)


@pytest.mark.parametrize("emitted", [None, 5 * HOUR_MS // 2, 0])
@pytest.mark.parametrize("requested", [(None, None), (HOUR_MS, 3 * HOUR_MS), (None, HOUR_MS // 2), (9 * HOUR_MS, None)])
def test_reading_a_range(stored, emitted, requested):
    path, rows = stored
    where = np.ones(500, bool)
    if requested[0] is not None:
        where &= rows["request_ms"] >= requested[0]
    if requested[1] is not None:
        where &= rows["request_ms"] < requested[1]
    if emitted is not None:
        where &= rows["emit_ms"] < emitted
    expected = in_order(rows, where)
    limits = {"request_from": requested[0], "request_until": requested[1], "emit_until": emitted}
    same(read_rows(path, SPEC, **limits), expected)
    columns = ["label", "user_id"]
    read = read_rows(path, SPEC, columns=columns, **limits)
    same(read, {name: expected[name] for name in (*columns, "partition")})


def test_records_end_at_hours_once_a_quarter_full(tmp_path):
    """Hours of emission with 5, 100, 30 and 3 rows, and at most 40 rows per record."""
    rows = make_rows(1, 138)
    hour = np.repeat([0, 1, 2, 5], [5, 100, 30, 3])
    rows["emit_ms"] = hour * HOUR_MS + np.arange(138)
    for pieces in (1, 9):
        folder = tmp_path / str(pieces)
        folder.mkdir()
        writer = ShardWriter(folder, 0, rows_per_record=40)
        for part in np.array_split(np.arange(138), pieces):
            writer.append({name: column[part] for name, column in rows.items()})
        writer.close()
        index = json.loads((folder / index_name(0)).read_text())
        # 5 rows are less than a quarter, so the first record goes on into the next hour.
        assert [record["rows"] for record in index] == [40, 40, 25, 30, 3]
    assert (tmp_path / "1" / index_name(0)).read_bytes() == (tmp_path / "9" / index_name(0)).read_bytes()


def test_plain_webdataset_reads_the_tars(stored):
    path, rows = stored
    urls = sorted(str(file) for file in path.glob("rows/*.tar"))
    assert len(urls) > SPEC.partitions
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len({sample["__key__"] for sample in samples}) == len(samples)
    batches = [safetensors.numpy.load(sample["safetensors"]) for sample in samples]
    read = {name: np.concatenate([batch[name] for batch in batches]) for name in row_columns(SPEC)}
    expected = in_order(rows, np.ones(500, bool))
    del expected["partition"]
    same(read, expected)


def test_the_same_rows_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_rows(tmp_path / name, SPEC, make_rows(3, 100), rows_per_record=16)
    files = sorted(file.name for file in (tmp_path / "a" / FOLDER).iterdir())
    for name in files:
        assert (tmp_path / "a" / FOLDER / name).read_bytes() == (tmp_path / "b" / FOLDER / name).read_bytes()


def test_index_places_are_those_of_the_tar(stored):
    path, _ = stored
    for partition in range(SPEC.partitions):
        for record in json.loads((path / FOLDER / index_name(partition)).read_text()):
            with tarfile.open(path / FOLDER / record["shard"]) as tar:
                places = [(member.offset_data, member.size) for member in tar]
            assert (record["offset"], record["size"]) in places


def test_existing_rows_are_not_overwritten(stored):
    path, rows = stored
    with pytest.raises(FileExistsError):
        write_rows(path, SPEC, rows)


def first_record(path: Path) -> tuple[Path, dict]:
    record = json.loads((path / FOLDER / index_name(1)).read_text())[2]
    return path / FOLDER / record["shard"], record


def flip(shard: Path, record: dict) -> None:
    data = bytearray(shard.read_bytes())
    data[record["offset"] + record["size"] - 1] ^= 0x10
    shard.write_bytes(data)


def cut_short(shard: Path, record: dict) -> None:
    shard.write_bytes(shard.read_bytes()[: record["offset"] + 10])


DAMAGE = {
    "checksum does not match": flip,
    "is cut short": cut_short,
    "shard is missing": lambda shard, record: shard.unlink(),
    "Is a directory": lambda shard, record: (shard.unlink(), shard.mkdir()),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_record_is_named_or_skipped(stored, what):
    path, _ = stored
    shard, record = first_record(path)
    DAMAGE[what](shard, record)
    with pytest.raises(UserError, match=what) as caught:
        RowStore(path, SPEC).read(1, 2)
    assert shard.name in str(caught.value) and "record 2" in str(caught.value) and "\n" not in str(caught.value)

    skipping = RowStore(path, SPEC, on_corrupt="skip")
    assert skipping.read(1, 2) is None
    assert skipping.skipped_rows == record["rows"]
    assert skipping.read(0, 0) is not None and skipping.skipped_rows == record["rows"]


def emitted_before(entries: list[dict]) -> None:
    """Let the third record begin one millisecond before the end of the second."""
    entries[2]["emit_ms"][0] = entries[1]["emit_ms"][1] - 1
    entries[2]["request_ms"][0] = min(entries[2]["request_ms"][0], entries[2]["emit_ms"][0])


LONG = 5 * HOUR_MS
INDEX = {
    "has no rows or no bytes": [
        lambda entries: entries[2].update(rows=0),
        lambda entries: entries[2].update(size=0),
        lambda entries: entries[2].update(offset=-1),
    ],
    "ends before it begins": [
        lambda entries: entries[2].update(request_ms=[entries[2]["request_ms"][0], entries[2]["request_ms"][0] - 1]),
        lambda entries: entries[2].update(emit_ms=[entries[2]["emit_ms"][1] + 1, entries[2]["emit_ms"][1]]),
    ],
    "is emitted before it is requested": [
        lambda entries: entries[2]["request_ms"].__setitem__(0, entries[2]["emit_ms"][0] + 1),
        lambda entries: entries[2]["request_ms"].__setitem__(1, entries[2]["emit_ms"][1] + 1),
    ],
    "was requested outside the times of dataset.json": [
        lambda entries: entries[2]["request_ms"].__setitem__(0, -1),
        lambda entries: entries[2].update(request_ms=[0, LONG], emit_ms=[entries[2]["emit_ms"][0], 2 * LONG]),
    ],
    "is emitted before the record before it": [emitted_before],
}
"""Message -> changes of the third record of an index."""


def test_an_index_is_checked_in_itself(stored):
    path, rows = stored
    spec = replace(SPEC, rows=len(rows["user_id"]), span_ms=(int(rows["request_ms"].min()), LONG - 1))
    index = path / FOLDER / index_name(1)
    good = index.read_text()
    assert len(json.loads(good)) > 3
    # First and last times are inside, and so is a record that begins when the one before it ends.
    RowStore(path, replace(spec, span_ms=(spec.span_ms[0], int(rows["request_ms"].max())))).check(spec)
    entries = json.loads(good)
    entries[2]["emit_ms"][0] = entries[1]["emit_ms"][1]
    entries[2]["request_ms"][0] = min(entries[2]["request_ms"][0], entries[2]["emit_ms"][0])
    index.write_text(json.dumps(entries))
    RowStore(path, spec).check(spec)
    for message, changes in INDEX.items():
        for change in changes:
            entries = json.loads(good)
            change(entries)
            index.write_text(json.dumps(entries))
            with pytest.raises(UserError, match=f"damaged, record 2 {message}"):
                RowStore(path, spec).check(spec)


@pytest.mark.parametrize("content", [None, "", "[{}]", '{"a": 1}', '[{"shard": 3}]', "[1]"])
def test_a_damaged_index_is_named(stored, content):
    path, _ = stored
    index = path / FOLDER / index_name(2)
    index.unlink()
    if content is not None:
        index.write_text(content)
    with pytest.raises(UserError, match=r"part-00002\.index\.json") as caught:
        RowStore(path, SPEC).records(2)
    assert "\n" not in str(caught.value)


def test_any_fsspec_url(stored):
    path, _ = stored
    url = f"memory://{path.name}"
    fsspec.filesystem("memory").put(str(path), url, recursive=True)
    same(read_rows(url, SPEC), read_rows(path, SPEC))
    record = first_record(path)[1]
    shard = f"{url}/{FOLDER}/{record['shard']}"
    memory = fsspec.filesystem("memory")
    memory.pipe_file(shard, memory.cat_file(shard)[: record["offset"] + 10])
    with pytest.raises(UserError, match=r"memory://.*\.tar.*is cut short"):
        RowStore(url, SPEC).read(1, 2)
    memory.rm_file(shard)
    with pytest.raises(UserError, match=r"memory://.*\.tar.*is missing"):
        RowStore(url, SPEC).read(1, 2)


def test_an_unknown_protocol_is_refused():
    with pytest.raises(UserError, match=r"nosuch://x/.* cannot be opened"):
        RowStore("nosuch://x", SPEC).records(0)


def test_a_store_is_small_to_send_and_reads_there(stored):
    path, _ = stored
    store = RowStore(path, SPEC)
    sent = pickle.loads(pickle.dumps(store))
    same(sent.read(0, 1), store.read(0, 1))


@pytest.mark.parametrize("name", ["../part-00000-000000.tar", "/etc/hostname", "", None, 7, "part-00000-000000.tar\n"])
def test_an_index_names_shards_of_its_own_directory_only(stored, name):
    path, _ = stored
    index = path / FOLDER / index_name(0)
    entries = json.loads(index.read_text())
    entries[0]["shard"] = name
    index.write_text(json.dumps(entries))
    with pytest.raises(UserError, match=r"part-00000\.index\.json: not a valid shard index .*shard") as refused:
        RowStore(path, SPEC).records(0)
    assert "\n" not in str(refused.value)


def test_a_fifo_blocks_no_reader_and_an_index_reserves_no_memory(stored):
    path, _ = stored
    index = path / FOLDER / index_name(0)
    entries = json.loads(index.read_text())
    entries[0]["size"] = 1 << 60
    index.write_text(json.dumps(entries))
    with pytest.raises(UserError, match="cut short"):
        RowStore(path, SPEC).read(0, 0)
    shard = path / FOLDER / entries[0]["shard"]
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(UserError, match="not a regular file but a FIFO"):
        RowStore(path, SPEC).read(0, 0)


def test_a_shard_whose_last_bytes_do_not_fit_on_the_disk_is_an_error(tmp_path):
    rows = make_rows(4, 20)
    write_rows(tmp_path / "whole", SPEC, rows)
    largest = max(file.stat().st_size for file in (tmp_path / "whole" / FOLDER).glob("*.tar"))
    with files_of_at_most(largest - 1), pytest.raises(OSError, match="File too large"):
        write_rows(tmp_path / "short", SPEC, rows)
