"""The watchdog on real ranks: the rank and the line that it names, and the jobs that it does not end."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from launch.local import rank_environment
from launch.machine import free_port
from tests.distributed import watchdog_ranks
from trainer.console.exit_status import HUNG_STATUS
from trainer.runtime.watchdog import State, find_culprits, main_thread_state, report

TIMEOUT = 600.0
THROUGH = "through\n"

# A server process imports torch once, and the ranks are forked from it.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([watchdog_ranks.__name__])


class Ranks:
    """Ranks that run ``watchdog_ranks.main``; each is a process that writes its output to a file."""

    def __init__(
        self,
        directory: Path,
        scenario: str,
        seconds: float,
        ranks: int = 2,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        port = free_port()
        self.clock = watchdog_ranks.SharedClock(directory / "clock")
        self.files = [directory / f"rank-{rank}" for rank in range(ranks)]
        self.processes = [
            PROCESSES.Process(
                target=watchdog_ranks.start,
                args=({**rank_environment(rank, ranks, port), **(environment or {})}, file, scenario, seconds),
            )
            for rank, file in enumerate(self.files)
        ]
        for process in self.processes:
            process.start()

    def ended(self, rank: int) -> tuple[int | None, str]:
        """Wait for a rank, and return its exit status and output."""
        self.processes[rank].join(TIMEOUT)
        return self.processes[rank].exitcode, self.files[rank].read_text()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join(TIMEOUT)


def test_a_rank_that_sleeps_is_named_with_its_line_and_the_collective_of_the_others(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, "sleep", 1.0)
    try:
        for rank in (0, 1):
            status, output = ranks.ended(rank)
            assert status == HUNG_STATUS
            (line,) = [line for line in output.splitlines() if line.startswith("limelight: error:")]
            assert "after step 2: rank 1 is not in a collective: at " in line
            assert "watchdog_ranks.py" in line and "in sleep_for_ever" in line
            assert "rank 0 waits in all_reduce at trainer/runtime/distributed.py" in line
            # Only the rank at fault prints its stacks.
            assert ("limelight: stacks of rank 1" in output) == (rank == 1)
            assert ("sleep_for_ever()\n" in output) == (rank == 1)
            assert "Traceback" not in output
    finally:
        ranks.kill()


def test_a_rank_that_hangs_in_its_first_step_is_found_later(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, "sleep at first", 1.0)
    try:
        status, output = ranks.ended(0)
        assert status == HUNG_STATUS
        assert re.search(r"no step for \d+ s after step 0: rank 1 is not in a collective", output)
    finally:
        ranks.kill()


def test_ranks_of_several_machines_find_each_other(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, "sleep", 1.0, environment={"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost"})
    try:
        status, output = ranks.ended(0)
        assert status == HUNG_STATUS
        assert "rank 1 is not in a collective" in output and "rank 0 waits in all_reduce" in output
    finally:
        ranks.kill()


def test_a_rank_that_is_stopped_does_not_answer(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, "stop", 1.0)
    try:
        status, output = ranks.ended(0)
        assert status == HUNG_STATUS
        assert "rank 1 does not answer at all (stopped" in output and "rank 0 waits in all_reduce" in output
        assert ranks.processes[1].is_alive()
        ranks.processes[1].kill()
        assert ranks.ended(1)[0] == -signal.SIGKILL
    finally:
        ranks.kill()


def test_a_stopped_rank_that_goes_on_in_time_is_not_ended(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, "stop in time", 6.0)
    try:
        assert ranks.processes[1].pid is not None
        deadline = time.monotonic() + TIMEOUT
        while Path(f"/proc/{ranks.processes[1].pid}/stat").read_text().rpartition(") ")[2][0] != "T":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        ranks.clock.move(4.0)
        os.kill(ranks.processes[1].pid, signal.SIGCONT)
        assert [ranks.ended(rank) for rank in (0, 1)] == [(0, THROUGH), (0, THROUGH)]
    finally:
        ranks.kill()


@pytest.mark.parametrize("scenario", ["slow steps", "slow start", "strangers"])
def test_slow_ranks_and_strangers_end_nothing(tmp_path: Path, scenario: str) -> None:
    ranks = Ranks(tmp_path, scenario, 2.0)
    try:
        assert [ranks.ended(rank) for rank in (0, 1)] == [(0, THROUGH), (0, THROUGH)]
    finally:
        ranks.kill()


def test_announced_work_is_reported_and_ends_nothing(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, "busy", 1.5)
    try:
        assert [ranks.ended(rank)[0] for rank in (0, 1)] == [0, 0]
        assert "rank 1 is still writing a checkpoint; the other ranks wait for it" in ranks.ended(0)[1]
    finally:
        ranks.kill()


@pytest.mark.parametrize(
    ("scenario", "output"),
    [
        ("stop while others are busy", "rank 1 does not answer at all"),
        ("sleep while others are busy", "rank 1 is not in a collective"),
    ],
)
def test_announced_work_that_waits_for_another_rank_is_no_excuse(tmp_path: Path, scenario: str, output: str) -> None:
    ranks = Ranks(tmp_path, scenario, 1.0)
    try:
        status, printed = ranks.ended(0)
        assert status == HUNG_STATUS
        assert output in printed and "rank 0 waits in barrier at trainer/runtime/distributed.py" in printed
    finally:
        ranks.kill()


def test_a_rank_that_hangs_in_its_last_step_is_found(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, "last", 1.0)
    try:
        status, output = ranks.ended(0)
        assert status == HUNG_STATUS
        assert "rank 1 is not in a collective" in output and "rank 0 waits in barrier" in output
    finally:
        ranks.kill()


def test_ranks_that_wait_for_their_gpus_are_not_at_fault(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, "sleep while others wait for their GPUs", 1.0)
    try:
        status, output = ranks.ended(0)
        assert status == HUNG_STATUS
        assert "rank 1 is not in a collective" in output and "rank 0 waits in item() for its GPU" in output
        assert "limelight: stacks of rank 0" not in output
    finally:
        ranks.kill()


def test_gpus_that_all_hang_are_reported_as_such(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, "GPUs", 1.0)
    try:
        status, output = ranks.ended(0)
        assert status == HUNG_STATUS
        assert "a GPU hangs (dmesg: Xid)" in output and "is not in a collective" not in output
    finally:
        ranks.kill()


def test_ranks_in_different_collectives_are_all_shown(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, "different", 1.0)
    try:
        status, output = ranks.ended(0)
        if status == HUNG_STATUS:
            assert "all wait in collectives" in output and "limelight: stacks of rank 0" in output
        else:
            # Instead of hanging, gloo may report that the messages have different sizes.
            assert status == 1 and "Traceback" in output
    finally:
        ranks.kill()


def test_a_rank_that_fails_is_no_hang(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, "mistake", 30.0)
    try:
        status, output = ranks.ended(1)
        assert status == 1 and output.rstrip().endswith("ValueError: rank 1 fails by itself")
        assert "limelight: error" not in output
        assert ranks.ended(0)[0] == 1
    finally:
        ranks.kill()


def test_a_job_of_one_rank_is_watched_too(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, "sleep", 1.0, ranks=1)
    try:
        status, output = ranks.ended(0)
        assert status == HUNG_STATUS
        assert "rank 0 is not in a collective" in output and "limelight: stacks of rank 0" in output
    finally:
        ranks.kill()


def test_zero_seconds_switch_it_off(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, "slow start", 0.0)
    try:
        assert [ranks.ended(rank) for rank in (0, 1)] == [(0, THROUGH), (0, THROUGH)]
    finally:
        ranks.kill()


def test_the_rank_at_fault_is_found() -> None:
    waiting = State(0, 7, "all_reduce", "trainer/a.py:1 in f", "")
    working = State(1, 7, "", "trainer/b.py:2 in g", "")
    assert find_culprits({0: waiting, 1: working}, set(), 2) == [1]
    assert find_culprits({0: waiting}, {1}, 3) == [1, 2]
    assert find_culprits({0: waiting, 1: waiting}, set(), 2) == []
    assert report({0: waiting}, {1}, 3, 600) == (
        "no step for 600 s after step 7: rank 1 has ended; rank 2 does not answer at all (stopped, or stuck in "
        "compiled code?); rank 0 waits in all_reduce at trainer/a.py:1 in f"
    )
    many = {rank: State(rank, 7, "all_reduce", "trainer/a.py:1 in f", "") for rank in range(1, 512)}
    line = report({0: State(0, 7, "", "trainer/b.py:2 in g", ""), **many}, set(), 512, 600)
    assert line.endswith("rank 1 and 510 more each waits in all_reduce at trainer/a.py:1 in f") and len(line) < 300


def test_a_wait_of_python_s_own_is_no_collective() -> None:
    never, started = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        never.wait()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    started.wait()
    assert thread.ident is not None
    while sys._current_frames()[thread.ident].f_code.co_name != "wait":
        time.sleep(0.01)
    state = main_thread_state(3, 5, "", thread.ident)
    never.set()
    assert (state.rank, state.step, state.collective) == (3, 5, "")
    assert os.path.basename(threading.__file__) in state.place
