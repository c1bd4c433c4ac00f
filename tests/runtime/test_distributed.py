"""Joining the ranks of a job, the errors of a failed join, and the exit status of a rank."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.console.errors import UserError
from trainer.console.exit_status import BROKEN_PIPE_STATUS
from trainer.runtime import distributed
from trainer.runtime.distributed import World, choose_device

JOIN = """
import sys
from trainer.console.exit_status import exit_status
from trainer.runtime.distributed import World

def job():
    with World.join("cpu", timeout_seconds=20) as world:
        print(world.rank, world.size, world.agree(f"from {world.rank}"), world.gather(world.rank))
        print(world.sum(world.rank + 1), world.max(world.rank), world.first_problem("none here"))

sys.exit(exit_status(job))
"""


def join(**environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    return subprocess.run(
        [sys.executable, "-c", JOIN], env={**inherited, **environment}, capture_output=True, text=True, timeout=600
    )


def test_one_process_needs_no_launcher_and_no_port() -> None:
    done = join()
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0 1 from 0 [0]\n1 0 none here\n"


def test_a_port_in_use_is_named_in_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = join(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("limelight: error:")]
    assert len(errors) == 1 and f"127.0.0.1:{port}" in errors[0]
    assert "Traceback" not in done.stderr


def test_a_rank_that_is_no_number_is_named() -> None:
    done = join(RANK="first", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29999")
    assert done.returncode == 2
    assert "RANK='first'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none() -> None:
    with pytest.raises(UserError, match=r"train\.device=cpu"):
        choose_device("cuda", 0)
    with pytest.raises(UserError):
        World.join("cuda")
    assert choose_device("auto", 0).type == "cpu"


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1) == torch.device("cuda", 1)
    assert choose_device("cpu", 7).type == "cpu"
    with pytest.raises(UserError, match="there are 2"):
        choose_device("auto", 2)


@pytest.mark.parametrize("size", [1, 100_000])
def test_a_rank_ends_quietly_when_the_reader_of_its_output_has_closed_the_pipe(size: int, tmp_path: Path) -> None:
    """A small text fails at the last flush of stdout, a large one in ``print``."""
    program = (
        "import sys; from trainer.runtime.distributed import World, run_rank\n"
        "def job():\n"
        f"    with World.join('cpu'): print('x' * {size})\n"
        "sys.exit(run_rank(job))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=600,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (BROKEN_PIPE_STATUS, "")


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([None, None], None),
        (["no compiler", "no compiler"], "no compiler"),
        ([None, "no compiler", "no GPU", None], "on a (rank 1), b (rank 2): no compiler"),
        ([None, None, "no compiler", "no compiler"], "on b (rank 2, 3): no compiler"),
        ([None, *["x"] * 11], "on a (rank 1), b (rank 2, 3), c (rank 4, 5), d (rank 6, 7) and 2 more hosts: x"),
    ],
)
def test_a_problem_of_some_hosts_is_one_line_on_all_ranks(
    found: list[str | None], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hosts of two ranks each."""
    hosts = [*"aabbccddeeff"]

    def gathered(into: list[object], own: object, group: object) -> None:
        assert own == (found[0], "a") and len(into) == len(found)
        into[:] = zip(found, hosts, strict=False)

    monkeypatch.setattr(distributed.dist, "all_gather_object", gathered)
    monkeypatch.setattr(distributed.platform, "node", lambda: "a")
    world = World(0, len(found), torch.device("cpu"), control=None)  # type: ignore[arg-type]
    assert world.first_problem(found[0]) == expected
