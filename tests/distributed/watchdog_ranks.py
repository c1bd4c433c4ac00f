"""Rank of test_watchdog.py: each step is an all-reduce, and after a few steps rank 1 fails or hangs."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import torch

import trainer.runtime.watchdog
from trainer.runtime.distributed import World
from trainer.runtime.watchdog import Watchdog

STEPS = 6
BROKEN = 3


def sleep_for_ever() -> None:
    time.sleep(1000)


class Loss:
    """Stand-in for a loss on a GPU that waits for a collective there: its value never comes."""

    def __init__(self) -> None:
        lock = threading.Lock()
        lock.acquire()
        self.item = lock.acquire


def main(scenario: str, seconds: float) -> None:
    if scenario == "sleep at first":
        trainer.runtime.watchdog.FIRST_STEP_SECONDS = 2 * seconds
    with World.join("cpu") as world, Watchdog(world, seconds) as watchdog:
        time.sleep(2 * seconds if scenario == "slow start" else 0)
        culprit = world.rank == world.size - 1
        if scenario.endswith("GPUs"):
            world.device = torch.device("cuda", world.rank)
            trainer.runtime.watchdog._OWN += (__file__,)
        for step in range(1, STEPS + 1):
            if step == BROKEN and culprit:
                if scenario in ("sleep", "sleep while others wait for their GPUs"):
                    sleep_for_ever()
                if scenario == "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                if scenario == "busy":
                    with watchdog.busy("writing a checkpoint"):
                        time.sleep(3 * seconds)
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
                time.sleep(0.4 * seconds)
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
    main(scenario, seconds)
