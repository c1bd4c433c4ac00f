"""Workers and machines are lost under torchrun; the job goes on from its last checkpoint without a person."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil

from launch.machine import free_port
from tests.distributed.launches import PATIENCE, TORCHRUN, end, job, last_checkpoint, metrics, start
from trainer.manifest import list_checkpoints, read_manifest


def await_checkpoint(directory: Path, ranks: int, agents: list[subprocess.Popen[str]]) -> None:
    """Wait until so many ranks have saved their state twice: the older one stays while its manifest is read."""
    deadline = time.monotonic() + PATIENCE
    while True:
        saved = list_checkpoints(directory / "checkpoints")[:-1]
        if saved and read_manifest(saved[-1]).ranks == ranks:
            return
        if time.monotonic() > deadline or any(agent.poll() is not None for agent in agents):
            end(agents, expect=-1)
        time.sleep(0.02)


def worker(agent: subprocess.Popen[str], rank: int) -> psutil.Process:
    """The process of a rank that an agent started."""
    (found,) = (child for child in psutil.Process(agent.pid).children() if child.environ().get("RANK") == str(rank))
    return found


def test_a_lost_worker_is_restarted_and_nothing_is_lost(
    small_world: Path, undisturbed_run: Path, tmp_path: Path
) -> None:
    """At the same number of ranks the end is bit for bit that of a run that nothing happened to."""
    run = tmp_path / "run"
    command = (*TORCHRUN, "--standalone", "--nproc-per-node=2", "--max-restarts=1", "-m", "trainer.rank")
    agent = start(*command, *job(small_world, run))
    await_checkpoint(run, 2, [agent])
    worker(agent, 1).kill()
    (printed,) = end([agent])
    assert "going on from" in printed
    assert metrics(run) == metrics(undisturbed_run)
    ended, expected = last_checkpoint(run), last_checkpoint(undisturbed_run)
    assert ended.positions == expected.positions and ended.step == expected.step
    shards = [name for name in expected.files if name.endswith(".distcp")]
    assert len(shards) == 2
    assert [ended.files[name] for name in shards] == [expected.files[name] for name in shards]


def test_a_lost_machine_leaves_a_job_on_those_that_remain(
    small_world: Path, undisturbed_run: Path, tmp_path: Path
) -> None:
    """Two agents, each with a worker; one of them is gone with its worker, the other one finishes alone."""
    run = tmp_path / "run"
    endpoint = f"127.0.0.1:{free_port()}"
    agents = [
        start(
            *(*TORCHRUN, "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--local-addr=127.0.0.1"),
            *("--rdzv-backend=c10d", "--rdzv-id=elastic", f"--rdzv-endpoint={endpoint}", "--rdzv-conf"),
            f"is_host={int(first)},last_call_timeout=6,keep_alive_interval=1,keep_alive_max_attempt=4",
            *("-m", "trainer.rank", *job(small_world, run)),
            # As for a job that a machine may join later.
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        )
        for first in (True, False)
    ]
    await_checkpoint(run, 2, agents)
    # A machine that loses its power: all of its processes at one moment, the agent first, which would start others.
    for process in (agents[1].pid, *(child.pid for child in psutil.Process(agents[1].pid).children())):
        os.kill(process, signal.SIGKILL)
    agents[1].communicate()
    (printed,) = end(agents[:1])
    assert "going on from" in printed
    starts = json.loads((run / "environment.json").read_text())["starts"]
    assert (starts[-2]["ranks"], starts[-1]["ranks"]) == (2, 1)
    ended, expected = last_checkpoint(run), last_checkpoint(undisturbed_run)
    assert ended.finished and ended.ranks == 1
    assert ended.rows_done == ended.rows_total == expected.rows_total
    assert ended.positions == expected.positions
    rows = [behaviour["rows"] for behaviour in metrics(undisturbed_run).values()]
    assert [behaviour["rows"] for behaviour in metrics(run).values()] == rows
