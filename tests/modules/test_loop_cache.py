"""Files of compiled loops: whatever is in their place, a loop is computed, and kept again where that is possible."""

from __future__ import annotations

import pickle
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.full_disk import files_of_at_most


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def pickled(file: Path) -> None:
    """Write a file as numba itself does."""
    file.write_bytes(pickle.dumps("0.1.0") + pickle.dumps(((1.0, 2), {})))


def directory(file: Path) -> None:
    """Put a directory there: like a file of another user it cannot be opened or replaced, not even by root."""
    file.unlink()
    (file / "inside").mkdir(parents=True)


class Loop:
    """A loop in a module of its own, which each call reads anew."""

    def __init__(self, place: Path) -> None:
        self.module = place / "loops.py"
        self.module.write_text(
            "from modules.compiled import compiled\n@compiled()\ndef loop(x):\n    return 2 * x + 1\n"
        )

    def __call__(self) -> int:
        """Return the number of loops that come from a file."""
        loop = runpy.run_path(str(self.module))["loop"]
        assert loop(5) == 11
        return sum(loop.stats.cache_hits.values())

    @property
    def files(self) -> list[Path]:
        return sorted(self.module.parent.glob("__pycache__/*"))


@pytest.fixture
def loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Loop:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    caplog.set_level("WARNING", "modules.loop_cache")
    return Loop(tmp_path)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "modules.loop_cache"]


@pytest.mark.parametrize("damage", [cut, flip, empty, pickled])
def test_a_damaged_file_is_compiled_again_and_replaced(
    loop: Loop, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    assert (loop(), loop()) == (0, 1) and not warnings(caplog)
    (file,) = loop.files
    damage(file)
    assert loop() == 0
    assert warnings(caplog) == [f"a compiled loop cannot be used, and is compiled again: {file}: damaged"]
    assert loop() == 1 and loop.files == [file]


def test_a_file_that_can_be_neither_read_nor_replaced(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    loop()
    (file,) = loop.files
    directory(file)
    assert loop() == 0
    cannot_use, cannot_keep = warnings(caplog)
    assert cannot_use.startswith("a compiled loop cannot be used, and is compiled again: [Errno 21] Is a directory")
    assert cannot_keep.startswith("a compiled loop cannot be kept for the next start: [Errno 21] Is a directory")
    assert loop.files == [file], "nothing half-written"


def test_a_full_disk(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    with files_of_at_most(500):
        assert loop() == 0
    assert warnings(caplog) == ["a compiled loop cannot be kept for the next start: [Errno 27] File too large"]
    assert not loop.files and (loop(), loop()) == (0, 1)


def test_a_directory_that_can_no_longer_be_written(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    found = runpy.run_path(str(loop.module))["loop"]
    shutil.rmtree(loop.module.parent / "__pycache__")
    (loop.module.parent / "__pycache__").touch()
    assert found(5) == 11
    assert len(warnings(caplog)) == 2 and "cannot be kept for the next start" in warnings(caplog)[1]


def test_a_changed_source_is_compiled_again(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    loop()
    loop.module.write_text(loop.module.read_text().replace("2 * x + 1", "3 * x - 4"))
    assert (loop(), loop()) == (0, 1) and not warnings(caplog)
