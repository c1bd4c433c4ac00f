"""Errors of the system and signals: one line and an exit status; a defect of ours keeps its traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from tests.paths import ROOT
from trainer.console.errors import user_message
from trainer.console.exit_status import INTERRUPTED_STATUS, TERMINATED_STATUS, exit_status


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device"), "No space left on device; free some space"),
        (OSError(28, "No space left on device", "runs/a"), "runs/a: No space left on device; free"),
        (PermissionError(13, "Permission denied", "job.toml"), "job.toml: Permission denied; the user"),
        (RuntimeError("Symlink loop from '/a'"), "'/a': Too many levels of symbolic links"),
        (RuntimeError("[enforce fail at inline_container.cc:1] . unexpected pos 0 vs 1"), "is the disk full"),
        (pa.ArrowInvalid("Unexpected end of stream\nmore"), "ArrowInvalid: Unexpected end of stream more"),
        (UnicodeEncodeError("ascii", "/täg", 2, 3, "ordinal not in range"), "PYTHONUTF8=1"),
        (UnicodeDecodeError("utf-8", b"a\xff", 1, 2, "invalid"), "not utf-8 text: byte 0xff at 1"),
    ],
)
def test_errors_of_the_system_are_one_line(
    error: Exception, expected: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise error

    assert exit_status(fail) == 2
    told = capsys.readouterr().err
    assert told.startswith("limelight: error: ") and told.count("\n") == 1 and expected in told, told


@pytest.mark.parametrize(
    "error", [KeyError("a"), RuntimeError("shape"), ConnectionResetError("peer"), TypeError("x"), ValueError("y")]
)
def test_a_defect_of_ours_keeps_its_traceback(error: Exception) -> None:
    assert user_message(error) is None

    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        exit_status(fail)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, TERMINATED_STATUS), (signal.SIGINT, INTERRUPTED_STATUS)]
)
def test_a_signal_ends_a_command_and_its_unfinished_files(tmp_path: Path, number: int, status: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli.main", "data", "simulate", tmp_path / "w", "--users", "20000"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    until = time.monotonic() + 600
    while not any(tmp_path.iterdir()) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(number)
    told = process.communicate(timeout=600)[0]
    assert process.returncode == status, told
    assert "Traceback" not in told
    assert list(tmp_path.iterdir()) == []
