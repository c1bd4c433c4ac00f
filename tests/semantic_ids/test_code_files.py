"""Code files: whole or not there, of one version, and refused in one line when damaged."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.semantic_ids.segment_world import (
    START_MS,
    assigned,
    make_version,
    world_vectors,
    write_segments,
    write_vectors,
    write_world,
)
from trainer.console.errors import UserError
from trainer.data.format.segment_codes import CodeFile
from trainer.data.format.segments import UNKNOWN_AUTHOR
from trainer.semantic_ids import code_files
from trainer.semantic_ids.code_files import append_codes, assign_codes, assign_to_file, read_codes
from trainer.semantic_ids.code_store import StoreSettings
from trainer.semantic_ids.codebook_version import CodebookVersion
from trainer.semantic_ids.segments import SegmentVectors, TimeRange
from trainer.semantic_ids.sqlite_store import SqliteCodeStore


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return write_world(tmp_path / "world")


@pytest.fixture
def version(tmp_path: Path) -> CodebookVersion:
    return make_version(tmp_path / "version", 4, 3)


def test_a_file_has_room_author_time_and_codes(world: Path, version: CodebookVersion) -> None:
    codes = assigned(version, world)
    assert (codes.version, codes.levels, len(codes)) == (version.name, (4, 3), 400)
    assert codes.segment.tolist() == list(range(400)) and codes.item_id.tolist() == [row // 40 for row in range(400)]
    assert codes.author_id.tolist() == [100 + room // 2 for room in codes.item_id.tolist()]
    assert codes.known_ms[:2].tolist() == [START_MS + 30_000, START_MS + 60_000]
    assert (codes.codes == version.encode(world_vectors(10, 40))[0]).all()
    table = pq.read_table(world / "codes.parquet")
    assert table.column_names == ["item_id", "author_id", "segment", "known_ms", "code_1", "code_2", "start_ms"]
    assert codes.start_ms is not None and codes.start_ms.tolist() == (codes.known_ms - 30_000).tolist()


def test_rooms_without_author_and_segments_without_vector_are_counted(tmp_path: Path, version: CodebookVersion) -> None:
    world = tmp_path / "world"
    write_segments(world, np.array([1, 1, 2, 2, 3]), START_MS + np.arange(5), {1: 7})
    write_vectors(world, world_vectors(1, 3), np.array([0, 1, 3]))
    found = assign_codes(version, SegmentVectors.open(str(world)), TimeRange(), world / "codes.parquet", quiet=True)
    assert (found.segments, found.without_author, found.without_vector) == (3, 1, 2)
    codes = read_codes(world / "codes.parquet", version)
    assert codes.author_id.tolist() == [7, 7, -1]
    store = SqliteCodeStore(str(tmp_path / "codes.sqlite"), StoreSettings(version.name), 1.0)
    assert append_codes(codes, store, version, quiet=True).stored == 2
    assert store.recent(np.array([UNKNOWN_AUTHOR, 7]), np.array([START_MS + 9] * 2), 5).counts.tolist()[0] == 0
    store.close()


def test_appends_in_small_calls_are_the_same(
    world: Path, version: CodebookVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, runs = assigned(version, world), []
    for rows in (1 << 13, 3):
        monkeypatch.setattr(code_files, "APPENDED_ROWS", rows)
        store = SqliteCodeStore(str(tmp_path / f"{rows}.sqlite"), StoreSettings(version.name), 1.0)
        assert append_codes(codes, store, version, quiet=True) == (400, 0, 0, 0)
        assert append_codes(codes, store, version, quiet=True) == (0, 400, 0, 0)
        found = store.recent(np.arange(100, 106), np.full(6, START_MS + 10**7), 50)
        runs.append([part.tolist() for part in (found.counts, found.code, found.length, found.last_ms)])
        store.close()
    assert runs[0] == runs[1] and sum(runs[0][0]) > 50


def test_an_empty_range_is_a_file_without_rows(world: Path, version: CodebookVersion) -> None:
    assert len(assigned(version, world, until_ms=START_MS)) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e16, 0.0])
def test_bad_vectors_are_counted_and_leave_the_old_file(
    value: float, world: Path, version: CodebookVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = assigned(version, world)
    segments = SegmentVectors.open(str(world))
    vectors = np.array(segments.table.vectors)
    vectors[[5, 399]] = value
    # A table of vectors refuses such vectors when it is written; another program may have written it.
    monkeypatch.setattr(type(segments), "blocks", lambda self, rows: [(slice(0, 400), vectors)])
    with pytest.raises(UserError) as error:
        assign_codes(version, segments, TimeRange(), world / "codes.parquet", quiet=True)
    zero = value == 0
    assert f"{0 if zero else 2} of 400 vectors are not finite and {2 if zero else 0} are zero" in str(error.value)
    assert "the first is that of segment 5" in str(error.value)
    assert CodeFile.read(world / "codes.parquet").codes.tolist() == before.codes.tolist()
    assert not list(world.glob(".*"))


def test_vectors_of_another_dimension_or_model_are_refused(world: Path, tmp_path: Path) -> None:
    write_vectors(world, world_vectors(10, 40, dim=5))
    version = make_version(tmp_path / "version", 4)
    with pytest.raises(UserError, match=r"vectors have 5 elements, the codebook .* takes 8"):
        assigned(version, world)
    write_vectors(world, world_vectors(10, 40), model="other")
    for store in (None, str(tmp_path / "codes.sqlite")):
        with pytest.raises(UserError, match=r"vectors are from another model \(small, hash other\)"):
            assign_to_file(str(version.path), str(world), world / "codes.parquet", store=store, quiet=True)
    assert not (tmp_path / "codes.sqlite").exists()
    assert not (world / "codes.parquet").exists()


def test_a_full_disk_leaves_nothing(world: Path, version: CodebookVersion, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(UserError, match=r"codes.parquet: cannot be written \(No space left on device\)"):
        assigned(version, world)
    assert not list(world.glob("*codes.parquet*"))


def test_codes_of_another_version_are_refused_by_name(world: Path, version: CodebookVersion, tmp_path: Path) -> None:
    assigned(version, world)
    other = make_version(tmp_path / "other", 4, 5)
    with pytest.raises(UserError, match=rf"is of the codebook version '{version.name}', .*other is {other.name}"):
        read_codes(world / "codes.parquet", other)
    store = str(tmp_path / "codes.sqlite")
    out = tmp_path / "out.parquet"
    summary = assign_to_file(str(version.path), str(world), out, store=store, quiet=True)
    assert summary["store"]["stored"] == 400
    with pytest.raises(UserError, match=rf"has codes of the codebook '{version.name}', not '{other.name}'"):
        assign_to_file(str(other.path), str(world), tmp_path / "more.parquet", store=store, quiet=True)
    assert not (tmp_path / "more.parquet").exists()


@pytest.mark.parametrize(
    ("place", "message"),
    [("nowhere/codes.sqlite", "cannot be written, there is no directory"), ("http://x/y", "a store of codes must be")],
)
def test_a_place_for_no_store_is_refused_before_the_work(
    place: str, message: str, world: Path, version: CodebookVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code_files, "assign_codes", lambda *arguments, **options: pytest.fail("codes are assigned"))
    place = place if "://" in place else str(world / place)
    with pytest.raises(UserError, match=f"^{place}: {message}"):
        assign_to_file(str(version.path), str(world), world / "codes.parquet", store=place, quiet=True)


def test_every_damage_is_one_line(world: Path, version: CodebookVersion) -> None:
    assigned(version, world)
    path = world / "codes.parquet"
    content = path.read_bytes()
    # Four bytes of pages and of the footer, and lengths that are cut; a change in the data passes no hash.
    places = [0, 40, len(content) // 2, len(content) - 30]
    changed = [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in places]
    for damaged in (b"", b"PAR1", content[:-1], content[: len(content) // 2], *changed):
        path.write_bytes(damaged)
        try:
            found = read_codes(path, version)
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)
        else:
            # Bytes of the footer that nobody reads, such as statistics.
            path.write_bytes(content)
            assert found.codes.tolist() == read_codes(path, version).codes.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("format", "format is b'9'; this release reads format 1"),
        ("levels", "its metadata is not complete"),
        ("hash", "its metadata is not complete"),
        ("metadata", "no code file"),
        ("code", "its content differs from its hash"),
        ("column", "column 'code_2' is missing"),
        ("null", "a column has empty values"),
        ("start", "its content differs from its hash"),
        ("no starts", "column 'start_ms' is missing"),
    ],
)
def test_another_content_is_refused(change: str, message: str, world: Path, version: CodebookVersion) -> None:
    assigned(version, world)
    path = world / "codes.parquet"
    table = pq.read_table(path)
    metadata = {**(table.schema.metadata or {}), **(pq.read_metadata(path).metadata or {})}
    metadata = {key: value for key, value in metadata.items() if key.startswith(b"limelight")}
    if change == "format":
        metadata[b"limelight_codes_format"] = b"9"
    elif change == "metadata":
        metadata = {}
    elif change in ("levels", "hash"):
        del metadata[f"limelight_codes_{change}".encode()]
    elif change in ("column", "no starts"):
        table = table.drop_columns(["code_2" if change == "column" else "start_ms"])
    elif change == "start":
        table = table.set_column(6, "start_ms", pa.array(table["start_ms"].to_numpy() + 1))
    else:
        values = table["code_1"].to_pylist()
        values[7] = None if change == "null" else (values[7] + 1) % 4
        table = table.set_column(4, "code_1", pa.array(values, pa.int32()))
    pq.write_table(table.replace_schema_metadata(metadata), path)
    with pytest.raises(UserError) as error:
        read_codes(path, version)
    assert message in str(error.value) and "\n" not in str(error.value)
