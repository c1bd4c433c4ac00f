"""Start the ranks of a job on this machine, as torchrun would, and return the status of the rank that failed.

Imports next to nothing, so that the ranks start at once.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from launch.python_path import safe_environment
from trainer.console.errors import UserError, is_lost_peer
from trainer.console.exit_status import BROKEN_PIPE_STATUS, HUNG_STATUS, PREEMPTED_STATUS, USER_ERROR_STATUS
from trainer.console.run_log import LOG_NOTE_VARIABLE
from trainer.runtime.cores import available_cores
from trainer.runtime.store_socket import STORE_SOCKET_VARIABLE, open_store_socket

SETTLE_SECONDS = 1.0
"""Time after the first failure in which others may fail too, before the rank that caused it is chosen."""

TERMINATE_SECONDS = 30.0
"""Time between SIGTERM and SIGKILL for the remaining ranks, as long as torchrun's: one may be writing a checkpoint."""

LAST_LINES = 30
"""Number of last lines shown of a failed rank; more if its traceback starts earlier."""

TRACEBACK_LINES = 200
"""Number of last lines of a failed rank in which the start of its traceback is searched."""

ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable of a rank: file into which torch's ``record`` writes the exception that ended the job."""

PR_SET_PDEATHSIG = 1

_LIBC = ctypes.CDLL(None)


@dataclass
class Rank:
    """One started process. Rank 0 writes to the terminal, the others to files whose ends are shown when they fail."""

    number: int
    process: subprocess.Popen[bytes]
    output: IO[bytes] | None
    notes: Path

    @property
    def error(self) -> str | None:
        """Exception that ended the job on this rank, as ``type: message``; None if there was none."""
        try:
            text: str = json.loads((self.notes / ERROR_FILE_VARIABLE).read_text())["message"]["message"]
        except (OSError, ValueError):
            return None
        return text

    @property
    def status(self) -> int:
        """Exit status of the process; 1 after an exception, even if a signal ended the process on its way out."""
        status: int = self.process.returncode
        return 1 if status < 0 and self.error is not None else status

    @property
    def log(self) -> str | None:
        """Path of this rank's log; None if it ended before it opened one."""
        try:
            return (self.notes / LOG_NOTE_VARIABLE).read_text()
        except OSError:
            return None


def start_ranks(module: str, arguments: Sequence[str], ranks: int) -> int:
    """Run ``python -m module arguments`` as ``ranks`` processes and wait for all of them.

    SIGINT and SIGTERM are passed on to the ranks; a second one ends them at once. When a rank fails, the others are
    ended, and the last lines of the failed rank, with its traceback, are printed last.

    Returns:
        0; PREEMPTED_STATUS when the ranks saved their state on SIGTERM; the exit status of the rank that failed; or
        128 + the signal that ended a rank or was passed on.

    Raises:
        UserError: MASTER_PORT is set but in use.
    """
    listener = rendezvous_socket()
    port, descriptor = listener.getsockname()[1], listener.fileno()
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    started: list[Rank] = []
    signals: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        _signal(started, number if len(signals) == 1 else signal.SIGKILL)

    def await_end(rank: Rank) -> None:
        rank.process.wait()
        ended.put(rank.number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with tempfile.TemporaryDirectory(prefix="limelight-ranks-") as notes:
            for number in range(ranks):
                environment = {**rank_environment(number, ranks, port), STORE_SOCKET_VARIABLE: str(descriptor)}
                inherited = () if number else (descriptor,)
                started.append(_start(module, arguments, number, environment, inherited, Path(notes) / str(number)))
                # The first rank alone keeps it: when that rank ends, the others find the port closed.
                listener.close()
            for rank in started:
                threading.Thread(target=await_end, args=(rank,), daemon=True).start()
            failed = _wait(started, ended)
            statuses = {rank.process.returncode for rank in started}
            if failed is None or (PREEMPTED_STATUS in statuses and is_lost_peer(failed.error or "")):
                return PREEMPTED_STATUS if PREEMPTED_STATUS in statuses else 0
            by_signal = {-number for number in signals} | {128 + number for number in signals}
            if signals and (signal.SIGINT in signals or len(signals) > 1 or by_signal & statuses):
                return 128 + signals[0]
            return _report(failed)
    finally:
        listener.close()
        _signal(started, signal.SIGKILL)
        for number, handler in previous.items():
            signal.signal(number, handler)


def rendezvous_socket() -> socket.socket:
    """Return a socket that listens on MASTER_PORT if it is set, else on a free port.

    Raises:
        UserError: MASTER_PORT is not a port number, another process uses it, or this user may not open it.
    """
    port = os.environ.get("MASTER_PORT")
    if port is None:
        return open_store_socket()
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"MASTER_PORT={port}: not a port; use 1 to 65535, or unset it to have a free one chosen")
    try:
        return open_store_socket(int(port))
    except OSError as error:
        reason = "in use by another process" if error.errno == errno.EADDRINUSE else f"{error.strerror}"
        raise UserError(f"MASTER_PORT={port}: {reason}; unset it to have a free one chosen") from None


SLEEPING_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Variable that lets threads of PyTorch's operations sleep when an operation has ended.

By default they look for the next operation for about a millisecond, on cores that the threads of the compiled loops
need meanwhile: with two threads on two cores a ranker in fp32 trained 20 to 31 % fewer rows a second.
"""


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return the present environment with the variables that torchrun sets for one of ``ranks`` on this machine.

    OMP_NUM_THREADS is kept if it is set; otherwise the ranks share the cores evenly. So is OMP_WAIT_POLICY; otherwise
    threads sleep. A rank imports nothing from the working directory.
    """
    return {
        "OMP_NUM_THREADS": str(max(1, available_cores() // ranks)),
        **SLEEPING_THREADS,
        **safe_environment(os.environ),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _start(
    module: str,
    arguments: Sequence[str],
    rank: int,
    environment: Mapping[str, str],
    inherited: Sequence[int],
    notes: Path,
) -> Rank:
    parent = os.getpid()

    def die_with_parent() -> None:
        # Without this process nothing passes signals on, and nothing ends a rank that hangs.
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # Until the rank handles it in trainer/console/exit_status.py: importing torch takes seconds, and a
        # KeyboardInterrupt in the middle of an import is a traceback.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        if os.getppid() != parent:
            os._exit(1)

    notes.mkdir()
    output = tempfile.TemporaryFile() if rank else None  # noqa: SIM115 - lives as long as the rank
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env={
            **environment,
            **{variable: str(notes / variable) for variable in (LOG_NOTE_VARIABLE, ERROR_FILE_VARIABLE)},
        },
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if rank else None,
        # Its own session: ctrl-C reaches the ranks once, through us.
        start_new_session=True,
        pass_fds=inherited,
        preexec_fn=die_with_parent,
    )
    return Rank(rank, process, output, notes)


def _wait(started: Sequence[Rank], ended: queue.SimpleQueue[int]) -> Rank | None:
    """Wait for all ranks, and after a failure end the others. Returns the rank that caused it, or None."""
    running = len(started)
    failed: list[Rank] = []
    terminate_at = kill_at = float("inf")
    asked = False
    while running:
        pause = min(terminate_at, kill_at) - time.monotonic()
        try:
            rank = started[ended.get(timeout=None if pause == float("inf") else max(0.0, pause))]
        except queue.Empty:
            now = time.monotonic()
            asked = True
            if now >= kill_at:
                _signal(started, signal.SIGKILL)
                kill_at = float("inf")
            elif now >= terminate_at:
                _signal(started, signal.SIGTERM)
                terminate_at, kill_at = float("inf"), now + TERMINATE_SECONDS
            continue
        running -= 1
        status = rank.status
        if status == HUNG_STATUS:
            # The watchdogs have waited long enough, and a rank that hangs does not react to SIGTERM either.
            terminate_at, kill_at = float("inf"), min(kill_at, time.monotonic() + SETTLE_SECONDS)
            asked = True
            failed.append(rank)
        elif status == PREEMPTED_STATUS and not failed:
            # The state is saved on all ranks before the first of them ends.
            kill_at = min(kill_at, time.monotonic() + TERMINATE_SECONDS)
        elif status and status != PREEMPTED_STATUS and (not asked or rank.error is not None):
            # A rank that ends after SIGTERM may still be the cause: its exception can take a while to end the process.
            if not failed and not asked:
                terminate_at, kill_at = time.monotonic() + SETTLE_SECONDS, float("inf")
            failed.append(rank)
    return min(failed, key=_consequence) if failed else None


def _consequence(rank: Rank) -> int:
    """Return a sort key: the larger, the likelier a rank failed only because another one did. Ties keep their order.

    A lost peer causes an exception, or an abort in a thread of gloo or NCCL. So a user's mistake, a signal and any
    other exception come before these; a mistake on rank 0 comes first, since it is on the terminal already.
    """
    status = rank.status
    if status in (USER_ERROR_STATUS, BROKEN_PIPE_STATUS):
        return 0 if rank.number == 0 else 1
    if status == -signal.SIGABRT:
        return 4
    if status < 0:
        return 2
    return 5 if is_lost_peer(rank.error or "") else 3


def _report(rank: Rank) -> int:
    """Print how a rank failed, where its log is, and its last lines. Returns its exit status."""
    status = rank.status
    if status == BROKEN_PIPE_STATUS:
        # Whoever closed the pipe expects no more output: `limelight evaluate RUN --json | head -1`.
        return status
    lines = _last_lines(rank)
    if status == USER_ERROR_STATUS:
        lines = [line for line in lines if line.startswith("limelight: error:")] or lines
    else:
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
        if status == -signal.SIGKILL:
            how += " (out of memory?)"
        where = "" if rank.log is None else f"; its log is {rank.log}"
        lines.insert(0, f"limelight: rank {rank.number} {how}{where}" + ("; its last lines:" if lines else ""))
    if lines:
        print("\n".join(lines), file=sys.stderr, flush=True)
    return status if status >= 0 else 128 - status


def _last_lines(rank: Rank) -> list[str]:
    """Return a rank's last lines, from the start of its traceback; none for rank 0, which prints to the terminal."""
    if rank.output is None:
        return []
    rank.output.seek(0)
    lines = rank.output.read().decode(errors="replace").splitlines()[-TRACEBACK_LINES:]
    tracebacks = [number for number, line in enumerate(lines) if "Traceback (most recent call last):" in line]
    return lines[min([len(lines) - LAST_LINES, *tracebacks]) if len(lines) > LAST_LINES else 0 :]


def _signal(started: Sequence[Rank], number: int) -> None:
    """Signal the ranks that still run; SIGKILL also ends the processes that they started, such as loader workers.

    SIGINT ends a rank that has not begun its work at once.
    """
    for rank in started:
        try:
            if number == signal.SIGKILL or (number == signal.SIGINT and _blocks_ctrl_c(rank.process.pid)):
                os.killpg(rank.process.pid, signal.SIGKILL)
            elif rank.process.poll() is None:
                rank.process.send_signal(number)
        except ProcessLookupError:
            continue


def _blocks_ctrl_c(process: int) -> bool:
    """True if a rank still imports its modules: it has written nothing, and would take seconds to answer."""
    try:
        fields = Path(f"/proc/{process}/status").read_text().split()
        blocked = int(fields[fields.index("SigBlk:") + 1], 16)
    except (OSError, ValueError, IndexError):
        return False
    return bool(blocked >> (signal.SIGINT - 1) & 1)
