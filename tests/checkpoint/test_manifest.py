"""What a checkpoint directory must be before anything is read from it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.checkpoint.manifest import (
    MANIFEST,
    DatasetEntry,
    FileEntry,
    Manifest,
    NewerSchema,
    TableEntry,
    check_files,
    directory_name,
    file_entry,
    find_checkpoint,
    list_checkpoints,
    read_manifest,
    step_of,
    write_manifest,
)
from trainer.console.errors import UserError

names = st.text("abc./_-é", min_size=1, max_size=8)
counts = st.integers(0, 1 << 62)
shapes = st.lists(st.integers(0, 1 << 40), max_size=3).map(tuple)
tables = st.builds(
    TableEntry,
    table=names,
    rows=counts,
    dim=counts,
    module=names,
    sharding=names,
    kernel=names,
    ranks=st.lists(st.integers(0, 99)).map(tuple),
    shards=st.lists(st.tuples(counts, counts)).map(tuple),
)
manifests = st.builds(
    Manifest,
    step=counts,
    number=counts,
    finished=st.booleans(),
    created=names,
    ranks=st.integers(1, 9999),
    zero_stage=st.integers(0, 2),
    rows_done=counts,
    rows_total=counts,
    kind=names,
    behaviours=st.lists(names, max_size=3).map(tuple),
    table_optimizer=names,
    tables=st.lists(tables, max_size=2).map(tuple),
    dense=st.dictionaries(names, shapes, max_size=3),
    buffers=st.dictionaries(names, shapes, max_size=3),
    dataset=st.builds(DatasetEntry, path=names, fingerprint=names),
    positions=st.dictionaries(st.integers(0, 9999), st.tuples(counts, counts, counts), max_size=3),
    files=st.dictionaries(names, st.builds(FileEntry, bytes=counts, crc32=st.integers(0, (1 << 32) - 1)), max_size=3),
)


@given(manifest=manifests)
def test_a_manifest_reads_back(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("m")
    write_manifest(directory, manifest)
    assert read_manifest(directory) == manifest
    assert manifest.bytes == sum(entry.bytes for entry in manifest.files.values())


def example(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "step": 7,
        "number": 1,
        "finished": False,
        "created": "now",
        "ranks": 1,
        "zero_stage": 1,
        "rows_done": 5,
        "rows_total": 9,
        "kind": "ple",
        "behaviours": ("click",),
        "table_optimizer": "sgd",
        "tables": (),
        "dense": {},
        "buffers": {},
        "dataset": DatasetEntry(path="d", fingerprint="f"),
        "positions": {0: (0, 1, 2)},
        "files": {},
    }
    return Manifest(**{**values, **changes})


@given(place=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_changed_byte_is_noticed(place: int, value: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("m")
    write_manifest(directory, example())
    path = directory / MANIFEST
    text = bytearray(path.read_bytes())
    changed = text[place % len(text)] != value
    text[place % len(text)] = value
    path.write_bytes(text)
    try:
        # White space between two values may change; no value may.
        assert read_manifest(directory) == example()
    except UserError as error:
        assert changed and "\n" not in str(error)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", '{"schema_version": 1}', '{"crc32": 1}', "\0" * 300])
def test_what_is_no_manifest(text: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(UserError, match="damaged"):
        read_manifest(tmp_path)


def test_a_newer_schema_and_a_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a whole checkpoint .manifest.json is missing"):
        read_manifest(tmp_path)
    write_manifest(tmp_path, example(schema_version=2))
    with pytest.raises(NewerSchema, match=r"written by a newer version .schema 2; this one reads up to 1"):
        read_manifest(tmp_path)


def checkpoint(directory: Path, step: int) -> Path:
    """A checkpoint of two files."""
    path = directory / directory_name(step)
    (path / "model").mkdir(parents=True)
    (path / "model" / "a").write_bytes(os.urandom(1000))
    (path / "b").write_bytes(os.urandom(10))
    files = {name: file_entry(path / name) for name in ("model/a", "b")}
    write_manifest(path, example(step=step, files=files))
    return path


def test_files_that_are_not_what_was_written(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 5)
    manifest = read_manifest(path)
    assert check_files(path, manifest) == []
    content = (path / "model" / "a").read_bytes()
    for wrong, told in (
        (content[:-1], "model/a has 999 bytes instead of 1,000"),
        (bytes(1000), "model/a has another content than was written"),
        (content[:500] + bytes([content[500] ^ 1]) + content[501:], "model/a has another content than was written"),
    ):
        (path / "model" / "a").write_bytes(wrong)
        assert check_files(path, manifest) == [told]
        assert check_files(path, manifest, ["b"]) == []
    (path / "model" / "a").unlink()
    (path / "b").unlink()
    assert check_files(path, manifest, checksums=False) == ["model/a is missing", "b is missing"]


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    run = tmp_path / "run"
    checkpoints = run / "checkpoints"
    with pytest.raises(UserError, match="no checkpoint and no run with checkpoints here"):
        find_checkpoint(run)
    first, second, third = (checkpoint(checkpoints, step) for step in (3, 20, 100_000_000))
    (checkpoints / ".step-00000200.partial-abc").mkdir()
    (checkpoints / "step-notes").mkdir()
    (checkpoints / "step-00000300").write_text("a file")
    assert list_checkpoints(checkpoints) == [first, second, third]
    assert [step_of(path) for path in (first, second, third)] == [3, 20, 100_000_000]
    assert find_checkpoint(run) == find_checkpoint(checkpoints) == find_checkpoint(third) == third
    (third / "b").unlink()
    assert find_checkpoint(run) == second
    (second / MANIFEST).unlink()
    assert find_checkpoint(run) == first
    (first / MANIFEST).write_text(json.dumps({}))
    with pytest.raises(UserError, match=r"no whole checkpoint .*b is missing.*manifest\.json is missing.*damaged"):
        find_checkpoint(run)
