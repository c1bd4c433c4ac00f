"""Starts the ranks of a job on this machine, as torchrun would, and ends with the status of the one that failed.

Imports next to nothing, so that the ranks start at once.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import IO

from launch.machine import available_cores, free_port, port_in_use
from trainer.command import USER_ERROR_STATUS
from trainer.errors import UserError

SETTLE_SECONDS = 1.0
"""After the first failure the other ranks may fail by themselves for so long: then it is seen who failed for cause."""

TERMINATE_SECONDS = 10.0
"""Between asking the remaining ranks to end and ending them."""

LAST_LINES = 30
"""Lines of a failed rank that are shown."""

PR_SET_PDEATHSIG = 1

_LIBC = ctypes.CDLL(None)


@dataclass
class Rank:
    """One started process. Rank 0 writes to the terminal, the others to a file that is shown when they fail."""

    number: int
    process: subprocess.Popen[bytes]
    output: IO[bytes] | None


def start_ranks(module: str, arguments: Sequence[str], ranks: int) -> int:
    """Run ``python -m module arguments`` as ``ranks`` processes and wait for all of them.

    SIGINT and SIGTERM are passed on to the ranks; a second one ends them at once. When a rank fails the others are
    ended, and the last lines of the failed one are the last that is printed.

    Returns:
        0, the exit status of the rank that failed, or 128 + the signal that ended it or was passed on.

    Raises:
        UserError: MASTER_PORT is given but in use.
    """
    port = rendezvous_port()
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
        for number in range(ranks):
            started.append(_start(module, arguments, number, ranks, port))
        for rank in started:
            threading.Thread(target=await_end, args=(rank,), daemon=True).start()
        failed = _wait(started, ended)
        if signals:
            return 0 if failed is None else 128 + signals[0]
        return 0 if failed is None else _report(failed)
    finally:
        _signal(started, signal.SIGKILL)
        for number, handler in previous.items():
            signal.signal(number, handler)


def rendezvous_port() -> int:
    """MASTER_PORT if it is given, else a free port.

    Raises:
        UserError: MASTER_PORT is no port, or another process has it.
    """
    given = os.environ.get("MASTER_PORT")
    if given is None:
        return free_port()
    if not given.isdecimal() or not 0 < int(given) < 65536:
        raise UserError(f"MASTER_PORT={given}: not a port; use 1 to 65535, or unset it to have a free one chosen")
    if port_in_use(int(given)):
        raise UserError(f"MASTER_PORT={given}: in use by another process; unset it to have a free one chosen")
    return int(given)


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun would set for one rank of ``ranks`` on this machine, beside the present environment.

    OMP_NUM_THREADS is kept when set; else the ranks share the cores evenly.
    """
    return {
        "OMP_NUM_THREADS": str(max(1, available_cores() // ranks)),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _start(module: str, arguments: Sequence[str], rank: int, ranks: int, port: int) -> Rank:
    parent = os.getpid()

    def die_with_parent() -> None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    output = tempfile.TemporaryFile() if rank else None  # noqa: SIM115 - lives as long as the rank
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=rank_environment(rank, ranks, port),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if rank else None,
        # Its own session: ctrl-C reaches the ranks once, through us.
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    return Rank(rank, process, output)


def _wait(started: Sequence[Rank], ended: queue.SimpleQueue[int]) -> Rank | None:
    """Wait for all ranks; after a failure end those that remain. The rank that failed for cause, None if none did."""
    running = len(started)
    failed: list[Rank] = []
    terminate_at = kill_at = float("inf")
    while running:
        pause = min(terminate_at, kill_at) - time.monotonic()
        try:
            rank = started[ended.get(timeout=None if pause == float("inf") else max(0.0, pause))]
        except queue.Empty:
            now = time.monotonic()
            if now >= kill_at:
                _signal(started, signal.SIGKILL)
                kill_at = float("inf")
            elif now >= terminate_at:
                _signal(started, signal.SIGTERM)
                terminate_at, kill_at = float("inf"), now + TERMINATE_SECONDS
            continue
        running -= 1
        if rank.process.returncode:
            if not failed:
                terminate_at = time.monotonic() + SETTLE_SECONDS
            if not failed or terminate_at < float("inf"):
                failed.append(rank)
    return min(failed, key=_consequence) if failed else None


def _consequence(rank: Rank) -> int:
    """How likely a failure is only the consequence of another rank's; equal ones stay in order of time.

    A peer that has gone makes an exception, so a mistake of the user's or a signal comes first; rank 0's mistake stands
    on the terminal already.
    """
    if rank.process.returncode == USER_ERROR_STATUS:
        return 0 if rank.number == 0 else 1
    return 2 if rank.process.returncode < 0 else 3


def _report(rank: Rank) -> int:
    """Say how a rank failed, its last lines last. Its exit status."""
    status: int = rank.process.returncode
    lines = []
    if rank.output is not None:
        rank.output.seek(0)
        lines = rank.output.read().decode(errors="replace").splitlines()[-LAST_LINES:]
    if status == USER_ERROR_STATUS:
        lines = [line for line in lines if line.startswith("limelight: error:")] or lines
    else:
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
        if status == -signal.SIGKILL:
            how += " (out of memory?)"
        lines.insert(0, f"limelight: rank {rank.number} {how}" + ("; its last lines:" if lines else ""))
    if lines:
        print("\n".join(lines), file=sys.stderr, flush=True)
    return status if status >= 0 else 128 - status


def _signal(started: Sequence[Rank], number: int) -> None:
    """Signal the ranks that still run; SIGKILL also takes the processes they started, such as loader workers."""
    for rank in started:
        try:
            if number == signal.SIGKILL:
                os.killpg(rank.process.pid, number)
            elif rank.process.poll() is None:
                rank.process.send_signal(number)
        except ProcessLookupError:
            continue
