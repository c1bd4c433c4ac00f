"""Manifests, and the checks of a checkpoint directory before it is read."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.checkpoint.stored_checkpoint import write_model
from trainer.checkpoint.manifest import (
    MANIFEST,
    DatasetEntry,
    FileEntry,
    Manifest,
    NewerSchema,
    TableEntry,
    check_complete,
    check_files,
    directory_name,
    file_entry,
    find_checkpoint,
    list_checkpoints,
    read_manifest,
    step_of,
    write_manifest,
)
from trainer.checkpoint.store import _try_manifest
from trainer.checkpoint.writer import _retire
from trainer.config.sections import CheckpointConfig
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


@pytest.mark.parametrize("change", [1, -1, 1 << 31])
def test_a_manifest_whose_checksum_alone_is_wrong_is_damaged(tmp_path: Path, change: int) -> None:
    write_manifest(tmp_path, example())
    content = json.loads((tmp_path / MANIFEST).read_text())
    content["crc32"] += change
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"manifest\.json: damaged \(its checksum does not match\)"):
        read_manifest(tmp_path)


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
        # A changed byte may be white space between two values, but no value may change.
        assert read_manifest(directory) == example()
    except UserError as error:
        assert changed and "\n" not in str(error)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", '{"schema_version": 1}', '{"crc32": 1}', "\0" * 300])
def test_what_is_no_manifest(text: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=r"damaged|not valid JSON"):
        read_manifest(tmp_path)


def test_a_newer_schema_and_a_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a whole checkpoint .manifest.json is missing"):
        read_manifest(tmp_path)
    write_manifest(tmp_path, example(schema_version=2))
    with pytest.raises(NewerSchema, match=r"written by a newer version .schema 2; this one reads up to 1"):
        read_manifest(tmp_path)


def checkpoint(directory: Path, step: int) -> Path:
    """Write a checkpoint with two files of random content and the files that every checkpoint needs; return it."""
    path = directory / directory_name(step)
    write_model(path / "model", {"t": torch.ones(3)}, {}, files=1)
    (path / "model" / "a").write_bytes(os.urandom(1000))
    (path / "b").write_bytes(os.urandom(10))
    (path / "job.json").write_text("{}")
    (path / "rank-00000.pt").write_bytes(os.urandom(10))
    names = ("model/a", "b", "job.json", "rank-00000.pt", "model/.metadata", "model/__0_0.distcp")
    files = {name: file_entry(path / name) for name in names}
    write_manifest(path, example(step=step, files=files))
    return path


def test_files_that_are_not_what_was_written(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 5)
    manifest = read_manifest(path)
    assert check_files(path, manifest) == []
    content = (path / "model" / "a").read_bytes()
    for wrong, problem in (
        (content[:-1], "model/a has 999 bytes instead of 1,000"),
        (bytes(1000), "model/a has another content than was written"),
        (content[:500] + bytes([content[500] ^ 1]) + content[501:], "model/a has another content than was written"),
    ):
        (path / "model" / "a").write_bytes(wrong)
        assert check_files(path, manifest) == [problem]
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


def test_a_manifest_must_be_of_its_directory(tmp_path: Path) -> None:
    older = checkpoint(tmp_path / "checkpoints", 20)
    copied = tmp_path / "checkpoints" / directory_name(300)
    shutil.copytree(older, copied)
    message = f"{copied}: its manifest.json is of step 20; a checkpoint of this step is named step-00000020"
    with pytest.raises(UserError) as refused:
        read_manifest(copied)
    assert str(refused.value) == message
    assert find_checkpoint(tmp_path) == older
    _retire(tmp_path / "checkpoints", CheckpointConfig(keep=5))
    assert list_checkpoints(tmp_path / "checkpoints") == [older], "a copy is not kept for good"
    # Under a name that claims no step, a copy is a checkpoint like any other.
    shutil.copytree(older, tmp_path / "copy")
    assert find_checkpoint(tmp_path / "copy") == tmp_path / "copy" and read_manifest(tmp_path / "copy").step == 20


@pytest.mark.parametrize("left_out", ["job.json", "rank-00000.pt", "model/.metadata", "model/__0_0.distcp"])
def test_a_manifest_without_a_shard_is_not_complete(tmp_path: Path, left_out: str) -> None:
    older, newer = (checkpoint(tmp_path / "checkpoints", step) for step in (20, 300))
    manifest = read_manifest(newer)
    files = {name: entry for name, entry in manifest.files.items() if name != left_out}
    (newer / left_out).unlink()
    write_manifest(newer, manifest.model_copy(update={"files": files}))
    assert check_files(newer, read_manifest(newer)) == []
    (problem,) = check_complete(newer, read_manifest(newer))
    assert left_out in problem
    assert find_checkpoint(tmp_path) == older
    assert _try_manifest(newer) == (problem, None)


@pytest.mark.parametrize(
    "name",
    ["../b", "model/../b", "/etc/hostname", "", ".", "./b", "a\\b", "b\0", "x" * 2000, "link", "folder/file", "fifo"],
)
def test_files_outside_of_a_checkpoint_are_refused(tmp_path: Path, name: str) -> None:
    path = checkpoint(tmp_path, 20)
    (path / "link").symlink_to("/etc/hostname")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("x")
    (path / "folder").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(path / "fifo")
    manifest = read_manifest(path)
    write_manifest(path, manifest.model_copy(update={"files": {**manifest.files, name: manifest.files["b"]}}))
    for checksums in (True, False):
        (problem,) = check_files(path, read_manifest(path), checksums=checksums)
        assert "\n" not in problem and (name[:50] in problem or repr(name)[1:50] in problem)


def test_a_manifest_that_is_no_regular_file(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 20)
    (path / MANIFEST).unlink()
    os.mkfifo(path / MANIFEST)
    with pytest.raises(UserError, match=r"manifest\.json: not a regular file but a FIFO"):
        read_manifest(path)
    (path / MANIFEST).unlink()
    with (path / MANIFEST).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="such a file has at most"):
        read_manifest(path)


atoms = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(
        [10**400, -1, -(10**30), 1 << 64, 0, 1, 7, float("inf"), float("nan"), 1e308, "", "x", "../b", "7"]
    ),
)
trees = st.recursive(
    atoms, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An older and a newer checkpoint of a run."""
    checkpoints = tmp_path_factory.mktemp("run") / "checkpoints"
    return checkpoint(checkpoints, 20), checkpoint(checkpoints, 300)


@given(data=st.data(), change=trees, deep=st.sampled_from([False] * 9 + [True]), valid_checksum=st.booleans())
def test_a_damaged_manifest_never_blocks_the_checkpoint_before_it(
    two_checkpoints: tuple[Path, Path], data: st.DataObject, change: Any, deep: bool, valid_checksum: bool
) -> None:
    older, newer = two_checkpoints
    # Only the newer manifest is written anew; the older checkpoint stays as it is.
    content: Any = json.loads((older / MANIFEST).read_text()) | {"step": 300}
    holder, keys = content, []
    while True:
        key = data.draw(st.sampled_from(sorted(holder)))
        keys.append(key)
        if not isinstance(holder[key], dict) or not holder[key] or data.draw(st.booleans()):
            break
        holder = holder[key]
    action = data.draw(st.sampled_from(["replace", "remove", "add"]))
    if action == "remove":
        del holder[key]
    else:
        holder[key if action == "replace" else data.draw(st.text(max_size=5))] = "DEEP" if deep else change
    if valid_checksum and isinstance(content, dict) and action != "add":
        content["crc32"] = zlib.crc32(
            json.dumps(
                {k: v for k, v in content.items() if k != "crc32"}, sort_keys=True, separators=(",", ":")
            ).encode()
        )
    (newer / MANIFEST).write_text(json.dumps(content).replace('"DEEP"', DEEP))
    try:
        problem, manifest = _try_manifest(newer)
        assert (problem is None) != (manifest is None) and "\n" not in (problem or "")
        found = find_checkpoint(older.parent)
        whole = manifest is not None and not check_files(newer, manifest, checksums=False)
        assert found == (newer if whole else older)
    except NewerSchema as error:
        # Only a manifest with a right checksum can say so: a newer version wrote it.
        assert valid_checksum and keys == ["schema_version"] and "\n" not in str(error)


@pytest.mark.parametrize(
    "text", [DEEP, '{"a":' * 50_000, "1e999", "-Infinity", "9" * 10_000, '{"schema_version": 9}', "\ud800"]
)
def test_any_text_as_a_manifest(two_checkpoints: tuple[Path, Path], text: str) -> None:
    older, newer = two_checkpoints
    (newer / MANIFEST).write_bytes(text.encode(errors="surrogatepass"))
    assert find_checkpoint(older.parent) == older
    problem, manifest = _try_manifest(newer)
    assert manifest is None and problem is not None and "\n" not in problem and len(problem) < 400
