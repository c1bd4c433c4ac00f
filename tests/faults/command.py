"""``limelight train`` without a built-in fault: as a user types it, or forked from the nursery."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.harness import LIMIT_SECONDS, Job
from tests.paths import ROOT


class Command:
    """``limelight train`` of a job, started repeatedly, in new interpreters."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.process: subprocess.Popen[str] | None = None

    def run(self, step: int, act: Callable[[int, list[int]], None]) -> tuple[int, str]:
        """Run the command once.

        Args:
            step: ``act`` is called when a checkpoint of this step or a later one exists.
            act: receives the process ids of the launcher and of its ranks.

        Returns:
            Exit status and output.
        """
        process = self.process = subprocess.Popen(
            [sys.executable, "-m", "launch.cli.main", "train", *self.job.arguments, "--ranks", "2"],
            cwd=ROOT,
            # DeepSpeed compiles an optimizer on import, that nobody here uses; it takes seconds in each new process.
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        deadline = time.monotonic() + LIMIT_SECONDS
        while not any(int(path.name.removeprefix("step-")) >= step for path in self.job.checkpoints()):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.005)
        act(process.pid, children(process.pid))
        printed, _ = process.communicate(timeout=LIMIT_SECONDS)
        return process.returncode, printed

    def kill(self) -> None:
        """End the command if it still runs."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def run_forked(job: Job, step: int, act: Callable[[int], None]) -> tuple[int, str]:
    """Run the command once as :class:`Command` does, with launcher and ranks forked from the job's nursery.

    ``act`` receives the process id of the launcher.
    """
    out = job.directory / "command"
    process = job.nursery.start("launch.cli.main", ["train", *job.arguments, "--ranks", "2"], 0, {}, out)
    deadline = time.monotonic() + LIMIT_SECONDS
    status = None
    try:
        while not any(int(path.name.removeprefix("step-")) >= step for path in job.checkpoints()):
            status = job.nursery.wait(process, 0.01)
            assert status is None and time.monotonic() < deadline, out.read_text()
        act(process)
        status = job.nursery.wait(process, LIMIT_SECONDS)
        assert status is not None, out.read_text()
    finally:
        if status is None:
            os.killpg(process, signal.SIGKILL)
            job.nursery.wait(process, 10)
    return status, out.read_text()


def children(process: int) -> list[int]:
    """Return the process ids of the running children of a process, in order."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(") ")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == process:
            found.append(int(stat.parent.name))
    return sorted(found)
