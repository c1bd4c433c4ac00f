"""Files of compiled loops: whatever is in their place, a loop is computed, and kept again where that is possible."""

from __future__ import annotations

import errno
import fcntl
import importlib
import multiprocessing
import pickle
import runpy
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from numba.core.errors import TypingError

from modules import loop_cache
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
            "from modules.compiled import compiled\n@compiled('doubling')\ndef loop(x):\n    return 2 * x + 1\n"
        )

    def __call__(self) -> int:
        """Return the number of loops that come from a file."""
        loop = runpy.run_path(str(self.module))["loop"]
        assert loop(5) == 11
        return sum(loop.stats.cache_hits.values())

    @property
    def lock(self) -> Path:
        """The lock of the one file, which is removed."""
        (file,) = self.files
        file.unlink()
        return file.with_name(f".{file.name}.lock")

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


HOLDER = """
import fcntl, os, shutil, sys
lock, kept, file = sys.argv[1:]
held = open(lock, "ab")
fcntl.lockf(held, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
shutil.copy(kept, file)
os.unlink(lock)
"""


@contextmanager
def held(lock: Path, kept: Path, file: Path) -> Iterator[subprocess.Popen[str]]:
    """Let another process have the lock; it writes the file and ends when its input is closed."""
    command = [sys.executable, "-S", "-c", HOLDER, *map(str, (lock, kept, file))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


@contextmanager
def soon(work: Callable[[], object]) -> Iterator[None]:
    """Do something while the body runs."""
    timer = threading.Timer(0.2, work)
    timer.start()
    yield
    timer.join()


def close_input(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.close()


def call_at_once(module: Path, barrier: Any, results: Any) -> None:
    # A process can load only loops of a module that it can import.
    sys.path.insert(0, str(module.parent))
    barrier.wait()
    loop = importlib.import_module(module.stem).loop
    assert loop(5) == 11
    results.put(sum(loop.stats.cache_hits.values()))


def test_processes_that_start_together_compile_a_loop_once(loop: Loop) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=call_at_once, args=(loop.module, barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    assert sorted(results.get(timeout=300) for _ in processes) == [0, 1, 1]
    for process in processes:
        process.join()
    (file,) = loop.files
    assert file.suffix == ".loop", "no lock is left"


def test_a_loop_that_another_process_compiles_is_awaited(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loop_cache, "_told", set())
    caplog.set_level("INFO", "modules.loop_cache")
    loop()
    (file,) = loop.files
    kept = tmp_path / "kept"
    shutil.copy(file, kept)
    with held(loop.lock, kept, file) as process, soon(lambda: close_input(process)):
        assert loop() == 1
    assert warnings(caplog)[1:] == ["waiting for another process, which compiles loops of doubling for this processor"]
    assert loop.files == [file]


def test_a_process_that_is_killed_gives_its_lock_back(loop: Loop, tmp_path: Path) -> None:
    loop()
    (file,) = loop.files
    with held(loop.lock, tmp_path, file) as process, soon(process.kill):
        assert loop() == 0
    assert loop() == 1 and loop.files == [file]


def test_a_process_that_does_not_go_on_is_not_awaited_for_ever(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_cache, "WAIT_SECONDS", 0.1)
    loop()
    (file,) = loop.files
    with held(lock := loop.lock, tmp_path, file):
        assert (loop(), loop()) == (0, 1)
        assert lock.exists(), "it belongs to the other process"


def test_a_file_system_without_locks(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    assert (loop(), loop()) == (0, 1) and len(loop.files) == 1


def test_a_lock_that_cannot_be_opened(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    loop()
    loop.lock.mkdir()
    assert (loop(), loop()) == (0, 1) and not warnings(caplog)


def test_an_error_of_the_compiler_gives_the_lock_back(loop: Loop) -> None:
    loop.module.write_text(loop.module.read_text().replace("2 * x + 1", "x.nothing"))
    for _ in range(2):
        with pytest.raises(TypingError, match="nothing"):
            loop()
    assert not loop.files
