"""The same job under every launcher, on one machine and on two, gives the same model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from subprocess import SubprocessError

import pytest

from launch.machine import free_port
from tests.distributed.hosts import Host, NoNamespaces, loopbacks, namespaces, nursery_namespaces
from tests.distributed.launches import DEEPSPEED, ForkedAgent, end, job, metrics, start
from tests.nursery import Nursery


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Yield two hosts with a network between them, or two addresses of this machine if it allows no namespaces."""
    with ExitStack() as stack:
        try:
            found = stack.enter_context(namespaces())
        except (OSError, SubprocessError):
            found = loopbacks()
        yield found


@pytest.fixture
def forked_hosts(nursery: Nursery, tmp_path: Path) -> Iterator[list[Host]]:
    """Yield two hosts as ``hosts`` does, for forks of the nursery."""
    with ExitStack() as stack:
        try:
            found = stack.enter_context(nursery_namespaces(nursery, tmp_path))
        except NoNamespaces:
            found = loopbacks()
        yield found


def test_torchrun_on_two_hosts(
    nursery: Nursery, small_world: Path, undisturbed_run: Path, forked_hosts: list[Host], tmp_path: Path
) -> None:
    agents = [
        ForkedAgent(
            nursery,
            tmp_path / f"agent-{number}",
            *("--nnodes=2", f"--node-rank={number}", "--nproc-per-node=1"),
            *(f"--master-addr={forked_hosts[0].address}", f"--master-port={port}"),
            *("-m", "trainer.rank", *job(small_world, tmp_path / "run")),
            network=host.process,
        )
        for port in [free_port()]
        for number, host in enumerate(forked_hosts)
    ]
    printed = end(agents)
    assert "train: " in printed[0] and "train: " not in printed[1], "the first rank alone speaks"
    assert metrics(tmp_path / "run") == metrics(undisturbed_run)


@pytest.mark.slow
def test_deepspeed_with_a_hostfile_on_two_hosts(
    small_world: Path, undisturbed_run: Path, hosts: list[Host], tmp_path: Path
) -> None:
    (tmp_path / "hostfile").write_text("".join(f"{host.address} slots=1\n" for host in hosts))
    launchers = [
        start(
            *(*DEEPSPEED, "--hostfile", str(tmp_path / "hostfile"), "--no_ssh", f"--node_rank={number}"),
            *(f"--master_addr={hosts[0].address}", f"--master_port={port}"),
            *("--module", "trainer.rank", *job(small_world, tmp_path / "run")),
            prefix=host.prefix,
        )
        for port in [free_port()]
        for number, host in enumerate(hosts)
    ]
    end(launchers)
    assert metrics(tmp_path / "run") == metrics(undisturbed_run)


FAILING = "tests.distributed.failing_ranks"


def test_the_first_failing_ranks_traceback_is_the_last_word(tmp_path: Path) -> None:
    """Rank 0 fails too, because of the lost connection, but its error is only a consequence."""
    local = "import sys; from launch.local import start_ranks; sys.exit(start_ranks(sys.argv[1], sys.argv[2:], 2))"
    (printed,) = end([start(sys.executable, "-c", local, FAILING, "error", str(tmp_path))], expect=1)
    report = printed[printed.index("limelight: rank 1") :]
    log = tmp_path / "rank-00001.log"
    assert report.startswith(f"limelight: rank 1 exited with status 1; its log is {log}; its last lines:\n")
    assert "in lookup" in report and report.rstrip().endswith("KeyError: 'the reason'")
    assert "rank 1 step 7 | KeyError: 'the reason'" in log.read_text()


def torchrun_fails(nursery: Nursery, how: str, directory: Path) -> str:
    """Return the output of torchrun with two ranks."""
    arguments = ("--standalone", "--nproc-per-node=2", "-m", FAILING, how, directory)
    ended = nursery.run("torch.distributed.run", arguments)
    assert ended.status == 1, ended.stderr[-8000:]
    return ended.stdout + ended.stderr


def test_torchrun_names_the_first_failing_rank_as_the_cause(nursery: Nursery, tmp_path: Path) -> None:
    printed = torchrun_fails(nursery, "error", tmp_path)
    cause = printed[printed.rindex("Root Cause") :]
    assert "(local_rank: 1)" in cause and "KeyError: 'the reason'" in cause


def test_a_mistake_is_one_line_under_torchrun_too_and_stands_in_the_log(nursery: Nursery, tmp_path: Path) -> None:
    printed = torchrun_fails(nursery, "mistake", tmp_path)
    assert "limelight: error: id 12 is beyond table item" in printed.splitlines()
    assert "exitcode  : 2" in printed[printed.rindex("Root Cause") :]
    last = (tmp_path / "rank-00001.log").read_text().splitlines()[-1]
    assert last.endswith("rank 1 step 7 | limelight: error: id 12 is beyond table item")


def test_a_killed_rank_is_named_and_so_is_its_log(nursery: Nursery, tmp_path: Path) -> None:
    ended = nursery.run(FAILING, ["signal", tmp_path], ranks=2)
    assert ended.status == 137
    killed = f"limelight: rank 1 was ended by SIGKILL (out of memory?); its log is {tmp_path / 'rank-00001.log'}"
    assert ended.stderr.splitlines()[-1] == killed
