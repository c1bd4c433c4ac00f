"""The status of a run: what its job does now, how far it is, and how it ended.

Every job that writes a directory is inside of :func:`recorded_status`, so that ``limelight runs`` can show it::

    status.json     by the first rank: job, host, process, state, work with its rate, step; renewed every few seconds
    failure.json    by the rank that failed first by its own fault: the reason, in one line

A file is replaced as a whole and is not synced: it may be lost with the machine, and a disk that is full ends no run.
A process that was killed leaves ``running`` behind. A reader believes it only while the directory is locked.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainer.console.errors import UserError, is_lost_peer, one_line, user_message
from trainer.console.exit_status import Terminated
from trainer.console.progress import Progress, listening
from trainer.console.run_log import current_step
from trainer.runtime.preemption import Preempted
from trainer.runtime.stored_files import read_json_object

STATUS = "status.json"
FAILURE = "failure.json"

RUNNING, STOPPED, FINISHED, FAILED = "running", "stopped", "finished", "failed"

_MAX_BYTES = 1 << 16
_MAX_REASON = 1000
_LOST_PEER = "the connection to another rank was lost"

KILLED_REASON = "ended without a message: killed, out of memory, or the machine went down"
"""Reason of a job whose last status says that it runs, although it does not."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunStatus:
    """Content of ``status.json`` and ``failure.json``.

    Attributes:
        job: words of the command after ``limelight``, such as ``train``.
        state: ``running``, ``stopped``, ``finished`` or ``failed``.
        reason: why it stopped or failed, in one line.
        host, process: of the first rank.
        ranks: number of ranks.
        started, updated: ISO times, UTC: of the last start, and of this status.
        step: optimizer step.
        work: label, done, total, unit, per_second, seconds_left of the latest piece of work; empty before the first.
        peak_memory_bytes: largest resident memory of the first rank so far.
    """

    job: str
    state: str
    reason: str
    host: str
    process: int
    ranks: int
    started: str
    updated: str
    step: int
    work: dict[str, Any]
    peak_memory_bytes: int


class _Recorder:
    """Status of the job of this process."""

    def __init__(self, directory: Path, job: str, rank: int, ranks: int) -> None:
        self.directory, self.rank = directory, rank
        self._fixed = {
            "job": job,
            "host": platform.node(),
            "process": os.getpid(),
            "ranks": ranks,
            "started": _now(),
        }
        self._work: dict[str, Any] = {}

    def follow(self, progress: Progress) -> None:
        """Record the progress of a piece of work."""
        self._work = {
            "label": progress.label,
            "done": progress.done,
            "total": progress.total,
            "unit": progress.unit,
            "per_second": progress.per_second,
            "seconds_left": progress.seconds_left,
        }
        self.write(RUNNING)

    def write(self, state: str, reason: str = "") -> None:
        """Write ``status.json``, if this is the first rank."""
        if self.rank == 0 and self._is_own():
            _replace(
                self.directory / STATUS,
                {
                    **self._fixed,
                    "state": state,
                    "reason": reason[:_MAX_REASON],
                    "updated": _now(),
                    "step": current_step(),
                    "work": self._work,
                    "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                },
            )

    def fail(self, reason: str) -> None:
        """Write ``failure.json``, unless another rank has."""
        if self._is_own() and not (self.directory / FAILURE).exists():
            _replace(self.directory / FAILURE, {"rank": self.rank, "reason": reason[:_MAX_REASON], "time": _now()})

    def _is_own(self) -> bool:
        """True in the process of the job; False in one that it has forked, such as a loader worker."""
        return os.getpid() == self._fixed["process"]


_recorders: list[_Recorder] = []
"""Recorder of the job of this process; a job inside of another one comes last."""


@contextmanager
def recorded_status(directory: Path, job: str, rank: int, ranks: int) -> Iterator[None]:
    """Record the status of the job in the block, and how the block ends.

    Args:
        directory: of the run; nothing is recorded once it is gone.
        job: words of the command after ``limelight``.
        rank: of this process; the first one must hold the lock of the directory.
        ranks: number of ranks.
    """
    recorder = _Recorder(directory, job, rank, ranks)
    if rank == 0:
        with suppress(OSError):
            (directory / FAILURE).unlink(missing_ok=True)
        recorder.write(RUNNING)
    _recorders.append(recorder)
    try:
        with listening(recorder.follow):
            yield
    except BaseException as error:
        state, reason, own = _end(error)
        if state == FAILED and own:
            recorder.fail(reason)
        recorder.write(state, reason)
        raise
    else:
        recorder.write(FINISHED)
    finally:
        _recorders.remove(recorder)


def record_failure(reason: str) -> None:
    """Record that the job of this process fails, for code that ends the process without an exception."""
    if _recorders:
        _recorders[-1].fail(reason)
        _recorders[-1].write(FAILED, reason)


def status_directory() -> Path | None:
    """Return the directory of the job of this process; None outside of :func:`recorded_status`."""
    return _recorders[-1].directory if _recorders else None


def status_of_end(error: BaseException) -> tuple[str, str]:
    """Return the state and the reason of the job of this process, which an exception ends, as :func:`read_status`."""
    directory = status_directory()
    if directory is not None:
        # The rank that failed has written why before it ended; this one may have lost it, or got SIGTERM after it.
        with suppress(OSError, UserError):
            if failure := _failure(directory):
                return FAILED, failure
    return _end(error)[:2]


def read_status(directory: Path) -> RunStatus | None:
    """Return the status that is stored in a directory; None if an earlier version wrote it.

    Raises:
        OSError: a file cannot be read.
        UserError: a file is damaged.
    """
    try:
        stored = read_json_object(directory / STATUS, _MAX_BYTES)
    except FileNotFoundError:
        return None
    if failure := _failure(directory):
        stored |= {"state": FAILED, "reason": failure}
    kinds = {"str": str, "int": int, "dict[str, Any]": dict}
    for name, field in RunStatus.__dataclass_fields__.items():
        kind = kinds[str(field.type)]
        if type(stored.get(name)) is not kind:
            raise UserError(f"{directory / STATUS}: damaged, {name!r} is {stored.get(name)!a:.80}")
    return RunStatus(**{name: stored[name] for name in RunStatus.__dataclass_fields__})


def _failure(directory: Path) -> str:
    """Return the reason in ``failure.json``, and its rank if that is not the first; empty if there is no such file."""
    try:
        failure = read_json_object(directory / FAILURE, _MAX_BYTES)
    except FileNotFoundError:
        return ""
    rank = f"rank {failure.get('rank')}: " if failure.get("rank") else ""
    return f"{rank}{failure.get('reason')}"


def _end(error: BaseException) -> tuple[str, str, bool]:
    """Return the state and the reason of a job that an exception ends, and False if another rank is the cause."""
    if isinstance(error, Preempted) and error.__context__ is not None:
        # The launcher ends the remaining ranks after a failure; the exception of this rank comes first.
        error = error.__context__
    if isinstance(error, Preempted | Terminated):
        return STOPPED, "SIGTERM", True
    if isinstance(error, KeyboardInterrupt):
        return STOPPED, "ctrl-C", True
    if not isinstance(error, Exception):
        return STOPPED, type(error).__name__, True
    if is_lost_peer(f"{type(error).__name__}: {error}"):
        return FAILED, _LOST_PEER, False
    return FAILED, user_message(error) or one_line(error), True


def _replace(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a small file. A run does not end because of it: the checkpoint reports a full disk."""
    tmp_path = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        tmp_path.write_text(json.dumps(content, indent=1) + "\n")
        tmp_path.replace(path)
    except OSError as error:
        logger.debug(f"{path}: not written ({error.strerror})")
        with suppress(OSError):
            tmp_path.unlink(missing_ok=True)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
