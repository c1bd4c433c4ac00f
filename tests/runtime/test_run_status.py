"""The status of a run: progress, and how its job ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from trainer.console import progress
from trainer.console.errors import UserError
from trainer.console.exit_status import Terminated
from trainer.console.progress import Progress
from trainer.console.run_log import set_step
from trainer.runtime.preemption import Preempted
from trainer.runtime.run_lock import is_locked, lock_owner, locked
from trainer.runtime.run_status import FAILURE, STATUS, RunStatus, read_status, record_failure, recorded_status

LOST = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")


def stored(directory: Path) -> RunStatus:
    status = read_status(directory)
    assert status is not None
    return status


def end_by(directory: Path, error: BaseException | None, rank: int = 0) -> RunStatus:
    """Let a job end by an exception, and return what is stored."""
    with suppress(BaseException), recorded_status(directory, "train", rank, 2):
        if error is not None:
            raise error
    return stored(directory)


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (None, "finished", ""),
        (Preempted(), "stopped", "SIGTERM"),
        (Terminated(), "stopped", "SIGTERM"),
        (KeyboardInterrupt(), "stopped", "ctrl-C"),
        (UserError("the loss of step 7\nis nan"), "failed", r"the loss of step 7\nis nan"),
        (ZeroDivisionError("division by zero"), "failed", "ZeroDivisionError: division by zero"),
        (LOST, "failed", "the connection to another rank was lost"),
    ],
)
def test_the_end_of_a_job_is_stored_with_its_reason(
    tmp_path: Path, error: BaseException | None, state: str, reason: str
) -> None:
    status = end_by(tmp_path, error)
    assert (status.state, status.reason) == (state, reason)
    assert (status.job, status.ranks, status.process) == ("train", 2, os.getpid())
    assert end_by(tmp_path, None).state == "finished", "a failure does not outlive the next start"


def test_a_failure_before_sigterm_is_the_reason(tmp_path: Path) -> None:
    with pytest.raises(Preempted), recorded_status(tmp_path, "train", 0, 2):
        try:
            raise UserError("the disk is full")
        finally:
            raise Preempted
    assert stored(tmp_path).reason == "the disk is full"


def test_the_rank_that_is_at_fault_gives_the_reason(tmp_path: Path) -> None:
    with suppress(RuntimeError), recorded_status(tmp_path, "train", 0, 2):
        with suppress(UserError), recorded_status(tmp_path, "train", 1, 2):
            raise UserError("rows are damaged")
        raise LOST
    assert stored(tmp_path).reason == "rank 1: rows are damaged"
    with suppress(Preempted), recorded_status(tmp_path, "train", 0, 2):
        record_failure("rank 1 hangs")
        raise Preempted
    status = stored(tmp_path)
    assert (status.state, status.reason) == ("failed", "rank 1 hangs")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0.0)
    yield
    set_step(0)


def test_the_progress_of_the_work_is_stored(tmp_path: Path, impatient: None) -> None:
    with recorded_status(tmp_path, "train", 0, 1), Progress("train", 300, "rows") as work:
        set_step(12)
        work.advance(100)
        status = stored(tmp_path)
    assert (status.state, status.step) == ("running", 12)
    assert [status.work[name] for name in ("label", "done", "total", "unit")] == ["train", 100, 300, "rows"]
    assert status.work["per_second"] > 0 and status.work["seconds_left"] > 0 and status.peak_memory_bytes > 1 << 20
    work.advance(1)
    assert stored(tmp_path).work["done"] == 100, "work after the job is not the job's"


def test_a_status_that_cannot_be_written_ends_nothing(tmp_path: Path, impatient: None) -> None:
    gone = tmp_path / "gone"
    with recorded_status(gone, "quantize", 0, 1), Progress("fit", 2, "rows") as work:
        work.advance(1)
    assert not gone.exists() and read_status(gone) is None


def test_a_forked_worker_writes_no_status(tmp_path: Path) -> None:
    with recorded_status(tmp_path, "train", 0, 1):
        if not (worker := os.fork()):
            record_failure("the worker fails")
            os._exit(0)
        os.waitpid(worker, 0)
        assert stored(tmp_path).state == "running" and not (tmp_path / FAILURE).exists()


@pytest.mark.parametrize("content", ["", "[]", '{"job": 1}', "{}"])
def test_a_damaged_status_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / STATUS).write_text(content)
    with pytest.raises(UserError, match=r"status\.json"):
        read_status(tmp_path)


HOLD = """
import sys, time
from pathlib import Path
from trainer.runtime.run_lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""

ASK = """
import sys
from pathlib import Path
from trainer.runtime.run_lock import is_locked
print(is_locked(Path(sys.argv[1])))
"""


def test_to_ask_for_a_lock_takes_and_drops_none(tmp_path: Path) -> None:
    assert not is_locked(tmp_path) and lock_owner(tmp_path) == {}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        assert is_locked(tmp_path) and lock_owner(tmp_path)["process"] == holder.pid
        holder.kill()
    with locked(tmp_path):
        # To open and close the file would drop this process's own lock.
        assert not is_locked(tmp_path) and lock_owner(tmp_path)["process"] == os.getpid()
        assert subprocess.check_output([sys.executable, "-c", ASK, str(tmp_path)], text=True) == "True\n"
    assert json.loads((tmp_path / "lock").read_text())["process"] == os.getpid()
