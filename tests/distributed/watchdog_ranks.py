"""Rank of test_watchdog.py: each step is an all-reduce, and after a few steps rank 1 fails or hangs.

The watchdogs go by a clock of the test, so a rank that gets no processor for a while is not late.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch

import trainer.runtime.watchdog
from trainer.runtime.distributed import World
from trainer.runtime.watchdog import Watchdog

STEPS = 6
BROKEN = 3
MOVING = ("slow start", "slow steps", "stop in time", "strangers", "busy")
"""Scenarios that end by themselves: time passes where the ranks or the test say so, and nowhere else."""
HANGS_AT = {"sleep at first": 1, "last": STEPS}
"""Scenario -> step in which it hangs, and from which time passes by itself; by default :data:`BROKEN`."""


class SharedClock:
    """Clock of several processes, in a file. It stands still until it is moved, or until it is started.

    Args:
        path: file of the clock; it is made if it is missing.
    """

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        os.ftruncate(descriptor, 16)
        self._values = mmap.mmap(descriptor, 16)
        os.close(descriptor)

    def monotonic(self) -> float:
        """Return the seconds that have passed."""
        moved, started = struct.unpack("dd", self._values[:])
        return float(moved + (time.monotonic() - started if started else 0.0))

    def move(self, seconds: float) -> None:
        """Let time pass, a little at once, so that the watchdogs look at the clock several times."""
        for _ in range(4):
            self._values[:8] = struct.pack("d", struct.unpack("d", self._values[:8])[0] + seconds / 4)
            time.sleep(0.1)

    def start(self) -> None:
        """Let the time of the machine pass from now on."""
        self._values[8:] = struct.pack("d", time.monotonic())

    def stop(self) -> None:
        """Let no time pass from now on."""
        self._values[:] = struct.pack("dd", self.monotonic(), 0.0)


def sleep_for_ever() -> None:
    time.sleep(1000)


class Loss:
    """Stand-in for a loss on a GPU that waits for a collective there: its value never comes."""

    def __init__(self) -> None:
        lock = threading.Lock()
        lock.acquire()
        self.item = lock.acquire


def main(scenario: str, seconds: float, clock: SharedClock) -> None:
    trainer.runtime.watchdog.time = SimpleNamespace(monotonic=clock.monotonic, sleep=time.sleep)  # type: ignore[assignment]
    reported = threading.Event()
    if scenario == "busy":
        trainer.runtime.watchdog.ANSWER_SECONDS = 600.0
        report_now = trainer.runtime.watchdog._report_now

        def report(line: str) -> None:
            report_now(line)
            reported.set()

        trainer.runtime.watchdog._report_now = report
    if scenario == "sleep at first":
        trainer.runtime.watchdog.FIRST_STEP_SECONDS = 2 * seconds
    with World.join("cpu") as world, Watchdog(world, seconds) as watchdog:
        if scenario == "slow start":
            clock.move(2 * seconds)
        culprit = world.rank == world.size - 1
        if scenario.endswith("GPUs"):
            world.device = torch.device("cuda", world.rank)
            trainer.runtime.watchdog._OWN += (__file__,)
        for step in range(1, STEPS + 1):
            if culprit and scenario not in MOVING and step == HANGS_AT.get(scenario, BROKEN):
                clock.start()
            if step == BROKEN and culprit:
                if scenario in ("sleep", "sleep while others wait for their GPUs"):
                    sleep_for_ever()
                if scenario in ("stop", "stop in time"):
                    os.kill(os.getpid(), signal.SIGSTOP)
                if scenario == "busy":
                    with watchdog.busy("writing a checkpoint"):
                        clock.start()
                        reported.wait()
                        clock.stop()
                if scenario == "stop while others are busy":
                    os.kill(os.getpid(), signal.SIGSTOP)
                if scenario == "sleep while others are busy":
                    sleep_for_ever()
                if scenario == "mistake":
                    raise ValueError("rank 1 fails by itself")
                if scenario == "strangers":
                    for sent in (b"", b"GET / HTTP/1.1\r\n\r\n", b'{"token": "0", "rank": 1}\n'):
                        with socket.create_connection(watchdog._addresses[0]) as connection:
                            connection.sendall(sent)
            if step == 1 and culprit and scenario == "sleep at first":
                sleep_for_ever()
            if culprit and scenario == "slow steps":
                clock.move(0.4 * seconds)
            if step == STEPS and culprit and scenario == "last":
                # The last step: rank 0 finishes it, and waits in the barrier at the end.
                world.sum(1)
                sleep_for_ever()
            if step == BROKEN and scenario == "stop while others are busy":
                with watchdog.busy("saving a checkpoint"):
                    world.barrier()
            if step == BROKEN and scenario == "sleep while others are busy":
                writer = threading.Thread(target=world.barrier)
                writer.start()
                with watchdog.busy("saving a checkpoint"):
                    writer.join()
            if world.size == 2 and step == BROKEN and scenario == "different":
                world.barrier() if culprit else world.agree(step)
                world.barrier()
            if step == BROKEN and scenario.endswith("GPUs"):
                Loss().item()
            world.sum(1)
            watchdog.beat(step)
    print("through", flush=True)


def start(environment: Mapping[str, str], output: Path, scenario: str, seconds: float) -> None:
    """Run a rank in a process that has just been forked; its output goes to a file."""
    os.environ.update(environment)
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    main(scenario, seconds, SharedClock(output.with_name("clock")))
