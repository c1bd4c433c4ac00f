"""Loss of workers and machines under torchrun: the job resumes from its last checkpoint without a person."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from launch.machine import free_port
from tests.distributed.elastic_agent import ALONE
from tests.distributed.launches import (
    TIMEOUTS,
    TORCHRUN,
    ForkedAgent,
    Started,
    end,
    job,
    last_checkpoint,
    metrics,
    start,
)
from tests.nursery import Nursery
from trainer.checkpoint.manifest import list_checkpoints, read_manifest


def await_checkpoint(directory: Path, ranks: int, agents: Sequence[Started]) -> None:
    """Wait until ``ranks`` ranks have saved two checkpoints; the older one exists while its manifest is read."""
    deadline = time.monotonic() + TIMEOUTS
    while True:
        saved = list_checkpoints(directory / "checkpoints")[:-1]
        if saved and read_manifest(saved[-1]).ranks == ranks:
            return
        if time.monotonic() > deadline or any(agent.poll() is not None for agent in agents):
            end(agents, expect=-1)
        time.sleep(0.02)


def start_machine(
    nursery: Nursery, directory: Path, endpoint: str, arguments: list[str], *, first: bool
) -> ForkedAgent:
    """Start the torchrun agent of one machine, with one worker; the first agent hosts the rendezvous.

    What they print goes to a file in ``directory``. A machine begins alone only if ``directory/alone`` exists.
    """
    return ForkedAgent(
        nursery,
        directory / f"machine-{0 if first else 1}",
        *("--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--local-addr=127.0.0.1"),
        *("--rdzv-backend=c10d", "--rdzv-id=elastic", f"--rdzv-endpoint={endpoint}", "--rdzv-conf"),
        f"is_host={int(first)},keep_alive_interval=1,keep_alive_max_attempt=4",
        *("-m", "trainer.rank", *arguments),
        module="tests.distributed.elastic_agent",
        # Without the second setting no machine can join a running job.
        **{ALONE: str(directory / "alone"), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )


def ranks_of_starts(run: Path) -> list[int]:
    return [begun["ranks"] for begun in json.loads((run / "environment.json").read_text())["starts"]]


def worker(agent: Started, rank: int) -> psutil.Process:
    """Return the process id of the rank that an agent started."""
    (found,) = (child for child in psutil.Process(agent.pid).children() if child.environ().get("RANK") == str(rank))
    return found


@pytest.mark.slow
def test_a_lost_worker_is_restarted_and_nothing_is_lost(
    small_world: Path, undisturbed_run: Path, tmp_path: Path
) -> None:
    """On the same number of ranks, the result equals that of an undisturbed run bit for bit."""
    run = tmp_path / "run"
    command = (*TORCHRUN, "--standalone", "--nproc-per-node=2", "--max-restarts=1", "-m", "trainer.rank")
    agent = start(*command, *job(small_world, run))
    await_checkpoint(run, 2, [agent])
    worker(agent, 1).kill()
    (printed,) = end([agent])
    assert "resuming from" in printed
    assert metrics(run) == metrics(undisturbed_run)
    ended, expected = last_checkpoint(run), last_checkpoint(undisturbed_run)
    assert ended.positions == expected.positions and ended.step == expected.step
    shards = [name for name in expected.files if name.endswith(".distcp")]
    assert len(shards) == 2
    assert [ended.files[name] for name in shards] == [expected.files[name] for name in shards]


def test_a_lost_machine_leaves_a_job_on_those_that_remain(
    nursery: Nursery, small_world: Path, undisturbed_run: Path, tmp_path: Path
) -> None:
    """One of two agents is killed with its worker, and the other one finishes alone."""
    run = tmp_path / "run"
    endpoint = f"127.0.0.1:{free_port()}"
    agents = [start_machine(nursery, tmp_path, endpoint, job(small_world, run), first=first) for first in (True, False)]
    await_checkpoint(run, 2, agents)
    (tmp_path / "alone").touch()
    # As in a power failure, all processes end at once; the agent is first, because it would start a new worker.
    for process in (agents[1].pid, *(child.pid for child in psutil.Process(agents[1].pid).children())):
        # A spare process of the agent may have ended with it.
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    agents[1].communicate()
    (printed,) = end(agents[:1])
    assert "resuming from" in printed
    assert ranks_of_starts(run)[-2:] == [2, 1]
    ended, expected = last_checkpoint(run), last_checkpoint(undisturbed_run)
    assert ended.finished and ended.ranks == 1
    assert ended.rows_done == ended.rows_total == expected.rows_total
    assert ended.positions == expected.positions
    rows = [behaviour["rows"] for behaviour in metrics(undisturbed_run).values()]
    assert [behaviour["rows"] for behaviour in metrics(run).values()] == rows


@pytest.mark.slow
def test_a_machine_that_comes_later_takes_part(nursery: Nursery, small_world: Path, tmp_path: Path) -> None:
    """The first machine saves its state when the second one joins, and both continue from this checkpoint."""
    run = tmp_path / "run"
    endpoint = f"127.0.0.1:{free_port()}"
    arguments = job(small_world, run, "train.batch_size=8", "train.epochs=12", "checkpoint.every_steps=50")
    (tmp_path / "alone").touch()
    first = start_machine(nursery, tmp_path, endpoint, arguments, first=True)
    await_checkpoint(run, 1, [first])
    # From here on both wait for each other.
    (tmp_path / "alone").unlink()
    second = start_machine(nursery, tmp_path, endpoint, arguments, first=False)
    printed, _ = end([first, second])
    assert "stopped by SIGTERM" in printed and "resuming from" in printed
    assert ranks_of_starts(run) == [1, 2]
    ended = last_checkpoint(run)
    assert ended.finished and ended.ranks == 2 and ended.rows_done == ended.rows_total
