"""Log of a job: messages on the terminal, and in a file for each rank."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tests.paths import ROOT
from trainer.console.errors import UserError
from trainer.console.run_log import open_log

LINE = re.compile(r"(?P<time>\S+) rank (?P<rank>\d+) step (?P<step>\d+) \|(?: (?P<text>.*))?")
HEAD = """
import logging, os, pathlib, sys, threading, warnings
from trainer.console.run_log import open_log, set_step, start_log
logger = logging.getLogger("trainer.test")
start_log()
logs = pathlib.Path(sys.argv[1])
rank = int(os.environ["RANK"])
"""


def talk(body: str, logs: Path, rank: int = 0, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run ``body`` as one rank of a job, in a process of its own, because the log replaces hooks of the process."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-c", HEAD + body, str(logs)],
        env={**environment, "RANK": str(rank), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == status, done.stderr
    return done


def read(logs: Path, rank: int = 0) -> list[tuple[int, int, str]]:
    """Return rank, step and text of each line of a rank's file, and check the form of every line."""
    lines = []
    for line in (logs / f"rank-{rank:05d}.log").read_text().splitlines():
        match = LINE.fullmatch(line)
        assert match, line
        assert abs(datetime.now().astimezone() - datetime.fromisoformat(match["time"])) < timedelta(minutes=5)
        lines.append((int(match["rank"]), int(match["step"]), match["text"] or ""))
    return lines


def texts(logs: Path, rank: int = 0) -> list[str]:
    return [text for _, _, text in read(logs, rank) if not text.startswith("process ")]


@pytest.mark.parametrize("rank", [0, 3])
def test_the_terminal_is_the_first_ranks_and_each_rank_has_a_file(rank: int, tmp_path: Path) -> None:
    body = """
logger.info("before the directory is known")
open_log(logs, rank)
logger.info("first\\nsecond\\n")
set_step(12); logger.info("a loss of é"); logger.debug("for the file \\udcff")
set_step(0); logger.info("")
"""
    done = talk(body, tmp_path / "run" / "logs", rank)
    if rank:
        assert done.stdout == ""
    else:
        assert done.stdout.startswith("before the directory is known\nfirst\nsecond\n")
        assert "for the file" not in done.stdout
    lines = read(tmp_path / "run" / "logs", rank)
    assert lines.pop(1)[2].startswith("process ")
    assert lines == [
        (rank, 0, "before the directory is known"),
        (rank, 0, "first"),
        (rank, 0, "second"),
        (rank, 12, "a loss of é"),
        (rank, 12, "for the file \\udcff"),
        (rank, 0, ""),
    ]


def test_a_restart_continues_the_file_and_names_its_process(tmp_path: Path) -> None:
    for number in range(2):
        talk(f"open_log(logs, rank); logger.info('start {number}')", tmp_path)
    assert texts(tmp_path) == ["start 0", "start 1"]
    assert sum(text.startswith("process ") for _, _, text in read(tmp_path)) == 2


def test_warnings_and_records_of_any_logger_are_kept_and_the_terminal_stays_as_it_was(tmp_path: Path) -> None:
    speak = """
own = logging.getLogger("own"); own.propagate = False; own.addHandler(logging.StreamHandler())
events = logging.getLogger("events"); events.setLevel(logging.DEBUG); events.addHandler(logging.NullHandler())
{opening}
warnings.warn("old call")
logging.getLogger("library.part").warning("slow path %d", 3)
logging.getLogger("library.part").info("detail"); events.debug("detail")
own.error("it says")
"""
    silent = talk(speak.format(opening=""), tmp_path, rank=1)
    kept = talk(speak.format(opening="open_log(logs, rank)"), tmp_path, rank=1)
    assert kept.stderr == silent.stderr and "slow path 3" in kept.stderr
    lines = texts(tmp_path, rank=1)
    assert any("UserWarning: old call" in line for line in lines)
    assert "WARNING library.part: slow path 3" in lines and "ERROR own: it says" in lines
    assert not any("detail" in line for line in lines)


@pytest.mark.parametrize(
    ("failure", "status", "last", "terminal"),
    [
        ("def deep(): raise KeyError('lost')\ndeep()", 1, "KeyError: 'lost'", "KeyError: 'lost'"),
        (
            "t = threading.Thread(target=lambda: 1 / 0, name='saver'); t.start(); t.join()",
            0,
            "ZeroDivisionError",
            "saver",
        ),
        ("import ctypes; ctypes.string_at(0)", -11, None, ""),
    ],
    ids=["exception", "thread", "native"],
)
def test_a_crash_leaves_its_traceback_in_the_file(
    failure: str, status: int, last: str | None, terminal: str, tmp_path: Path
) -> None:
    done = talk(f"open_log(logs, rank); set_step(7)\n{failure}", tmp_path, rank=1, status=status)
    assert terminal in done.stderr
    if last is None:
        # faulthandler writes these lines without the head, because the interpreter has crashed.
        raw = (tmp_path / "rank-00001.log").read_text()
        assert "Segmentation fault" in raw and 'File "<string>"' in raw
        return
    lines = read(tmp_path, rank=1)
    assert "Traceback (most recent call last):" in [text for _, _, text in lines]
    assert lines[-1][:2] == (1, 7) and lines[-1][2].startswith(last)


def test_threads_and_forked_processes_do_not_break_each_others_lines(tmp_path: Path) -> None:
    body = """
open_log(logs, rank)
def work(name):
    for number in range(300): logger.debug(f"{name} {number} " + "x" * 200)
child = os.fork()
threads = [threading.Thread(target=work, args=(f"{bool(child)}{n}",)) for n in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
if child: os.waitpid(child, 0)
else: os._exit(0)
"""
    talk(body, tmp_path, rank=1)
    written = texts(tmp_path, rank=1)
    assert sorted(written) == sorted(
        f"{side}{thread} {number} " + "x" * 200
        for side in (True, False)
        for thread in range(2)
        for number in range(300)
    )


def test_a_second_log_takes_over(tmp_path: Path) -> None:
    talk(
        "open_log(logs / 'a', rank); logger.info('one'); open_log(logs / 'b', rank); logger.info('two'); 1 / 0",
        tmp_path,
        status=1,
    )
    assert texts(tmp_path / "a") == ["one"]
    assert texts(tmp_path / "b")[0] == "two" and texts(tmp_path / "b")[-1].startswith("ZeroDivisionError")


def test_a_full_disk_is_reported_once_and_does_not_end_the_job(tmp_path: Path) -> None:
    body = """
open_log(logs, rank)
os.dup2(os.open("/dev/full", os.O_WRONLY), 3 if os.readlink("/proc/self/fd/3").endswith(".log") else 4)
logger.info("one"); logger.info("two")
"""
    done = talk(body, tmp_path)
    assert done.stdout == "one\ntwo\n"
    assert done.stderr.count("lines of the log are lost (No space left on device)") == 1


def test_a_directory_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/logs/rank-00002\.log: the log cannot be written \(Not a directory\)"):
        open_log(tmp_path / "file" / "logs", 2)


def test_the_path_is_noted_where_the_launcher_asks(tmp_path: Path) -> None:
    talk("os.environ['LIMELIGHT_LOG_NOTE'] = str(logs / 'note'); open_log(logs, rank)", tmp_path, rank=2)
    assert (tmp_path / "note").read_text() == str(tmp_path / "rank-00002.log")


def test_a_progress_bar_lets_lines_pass_and_is_lines_in_the_file(tmp_path: Path) -> None:
    body = (
        HEAD
        + """
from trainer.console.progress import Progress
open_log(logs, rank)
with Progress("train", 10, "rows") as progress:
    progress.advance(5); logger.info("in between"); progress.advance(5)
"""
    )
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    environment = {**os.environ, "RANK": "0", "PYTHONPATH": str(ROOT)}
    job = subprocess.Popen([sys.executable, "-c", body, str(tmp_path)], env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    assert job.wait(timeout=600) == 0
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert re.search(r"[\r\n]in between\r\n", shown) and "100%" in shown
    lines = texts(tmp_path)
    assert lines[0] == "in between" and lines[1].startswith("train: 10/10 rows (100 %)")
