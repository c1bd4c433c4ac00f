"""Atomic writes: a file is complete or does not exist."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import tempfile
from pathlib import Path

import pytest

from tests.full_disk import files_of_at_most
from tests.paths import ROOT
from trainer.runtime.files import set_usual_modes, write_fully, write_json


def test_files_and_directories_get_the_modes_of_new_ones(tmp_path: Path) -> None:
    made = Path(tempfile.mkdtemp(dir=tmp_path))
    (made / "inner").mkdir(0o700)
    for name in ("weights", "inner/weights"):
        (made / name).touch(0o600)
    (tmp_path / "elsewhere").touch(0o600)
    (made / "link").symlink_to(tmp_path / "elsewhere")
    previous = os.umask(0o022)
    try:
        set_usual_modes(made)
    finally:
        os.umask(previous)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (made, made / "inner", made / "weights")}
    assert modes == {made.name: 0o755, "inner": 0o755, "weights": 0o644}
    assert stat.S_IMODE((made / "inner" / "weights").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "elsewhere").stat().st_mode) == 0o600, "a link leads to a file of someone else"
    assert {path.name for path in made.iterdir()} == {"inner", "weights", "link"}


def test_one_file_gets_the_mode_of_a_new_one(tmp_path: Path) -> None:
    for name in ("weights", "other"):
        (tmp_path / name).touch(0o600)
    previous = os.umask(0o002)
    try:
        set_usual_modes(tmp_path / "weights")
    finally:
        os.umask(previous)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("weights", "other")] == [0o664, 0o600]


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_an_error_of_a_write_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as refused:
        write_json(tmp_path / "x.json", {"a": 1})
    assert refused.value.filename == str(tmp_path / "x.json")
    assert not list(tmp_path.iterdir())


def test_a_write_that_ends_short_is_an_error(tmp_path: Path) -> None:
    content = bytes(range(200))
    with open(tmp_path / "file", "wb", buffering=0) as file:
        with files_of_at_most(150), pytest.raises(OSError, match="File too large"):
            write_fully(file, content)
        file.seek(0)
        write_fully(file, content)
    assert (tmp_path / "file").read_bytes() == content


def test_a_file_is_reserved_before_it_is_mapped_to_be_written() -> None:
    """A write into the mapping of a file with holes ends the process with SIGBUS when the disk is full."""
    writable = re.compile(r"""memmap\([^\n]*["'](r\+|w\+)["']""")
    mapped = {path for path in ROOT.glob("trainer/**/*.py") if writable.search(path.read_text())}
    assert {"export.py", "content_vectors.py"} <= {path.name for path in mapped}
    assert not [path for path in mapped if "reserve(" not in path.read_text()]
