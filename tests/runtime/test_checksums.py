"""The manifest of a directory's files: any changed byte, missing file or path elsewhere is refused in one line."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.console.errors import UserError
from trainer.runtime.checksums import CHECKSUMS, verify_checksums, write_checksums


def folder(directory: Path) -> Path:
    (directory / "inner").mkdir()
    (directory / "a").write_bytes(bytes(range(256)))
    (directory / "inner" / "b").write_text("b")
    (directory / "empty").touch()
    write_checksums(directory)
    return directory


def refused(directory: Path, **arguments: Any) -> str:
    with pytest.raises(UserError) as error:
        verify_checksums(directory, **arguments)
    assert "\n" not in str(error.value) and str(directory) in str(error.value)
    return str(error.value)


@given(name=st.sampled_from(["a", "inner/b", CHECKSUMS]), place=st.integers(0, 999), value=st.integers(1, 255))
def test_a_changed_byte_is_refused(name: str, place: int, value: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = folder(tmp_path_factory.mktemp("c"))
    verify_checksums(directory)
    content = bytearray((directory / name).read_bytes())
    content[place % len(content)] ^= value
    (directory / name).write_bytes(content)
    if name != CHECKSUMS:
        assert str(directory / name) in refused(directory)
        return
    try:
        verify_checksums(directory)
        # White space between two values may change; no value may.
        (directory / "a").write_text("c")
        refused(directory)
    except UserError as error:
        assert "\n" not in str(error)


def test_missing_added_and_foreign_files(tmp_path: Path) -> None:
    directory = folder(tmp_path)
    (directory / "new").write_text("x")
    verify_checksums(directory)
    assert "does not list new" in refused(directory, needed=("a", "new"))
    (directory / "a").unlink()
    assert "missing" in refused(directory)
    os.mkfifo(directory / "a")
    assert "FIFO" in refused(directory)
    (directory / "a").unlink()
    (directory / "a").symlink_to("/etc/hostname")
    assert "leads out" in refused(directory)
    for name in ("../a", "/etc/hostname", "a/../a"):
        entries = {name: {"bytes": 1, "crc32": 0}}
        crc = zlib.crc32(json.dumps(entries, sort_keys=True, separators=(",", ":")).encode())
        (directory / CHECKSUMS).write_text(json.dumps({"files": entries, "crc32": crc}))
        assert name in refused(directory)


@pytest.mark.parametrize(
    "content", ["", "[]", "null", "{}", '{"files": 1}', "[" * 100_000, '{"files": {}, "crc32": 1e999}']
)
def test_a_damaged_manifest(tmp_path: Path, content: str) -> None:
    (folder(tmp_path) / CHECKSUMS).write_text(content)
    assert CHECKSUMS in refused(tmp_path)


def test_a_directory_of_an_earlier_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder(tmp_path) / CHECKSUMS).unlink()
    verify_checksums(tmp_path, ("a",))
