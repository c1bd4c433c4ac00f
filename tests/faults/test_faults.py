"""Faults in real jobs of two ranks: the job reports the fault, and the same command ends with the undisturbed state.

One or two faults of each kind run by default, all of them with ``--slow``; ``make chaos`` draws a hundred at random.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults import kinds
from tests.faults.command import Command, run_forked
from tests.faults.harness import RANKS, Job, differences, small_world, state_differences, trained_rows
from tests.nursery import Nursery
from trainer.console.exit_status import PREEMPTED_STATUS

SLOW = pytest.mark.slow
FILES = [*kinds.SAVE_FILES[0], *kinds.SAVE_FILES[1], "rename-before", "rename-after"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_world(tmp_path_factory.mktemp("faults") / "world")


@pytest.fixture(scope="module")
def undisturbed(nursery: Nursery, world: Path) -> Job:
    job = Job(nursery, world.parent / "undisturbed", world)
    ending = job.start()
    assert ending.status == 0, ending.output[-6000:]
    assert len(job.checkpoints()) == 3, "checkpoint.keep is 3"
    return job


@pytest.fixture
def job(nursery: Nursery, world: Path, tmp_path: Path) -> Job:
    return Job(nursery, tmp_path / "job", world)


@pytest.fixture(scope="module")
def stopped_once(nursery: Nursery, world: Path) -> tuple[Job, Path]:
    """Return a job that was stopped before its end, and a copy of its directory."""
    job = Job(nursery, world.parent / "stopped", world)
    fault = kinds.kill_all(random.Random(1), job).fault
    assert fault is not None
    # The save of step 12 waits for that of step 8.
    job.start({**fault, "step": 14})
    assert len(job.checkpoints()) >= 2
    return job, Path(shutil.copytree(job.directory, world.parent / "stopped-copy", symlinks=True))


@pytest.fixture
def stopped(stopped_once: tuple[Job, Path]) -> Job:
    """Return a stopped job with two checkpoints or more, in the same state for each test."""
    job, copy = stopped_once
    shutil.rmtree(job.directory)
    shutil.copytree(copy, job.directory, symlinks=True)
    return job


def endure(job: Job, attack: kinds.Attack, undisturbed: Job) -> None:
    """Start a job with a fault, check the reaction, and check that the same command ends as the undisturbed job."""
    attack.prepare(job)
    ending = job.start(attack.fault)
    assert not attack.problems(ending), f"{attack.problems(ending)}\n{ending.output[-6000:]}"
    assert ending.struck or attack.fault is None, ending.output[-6000:]
    attack.repair(job)
    go_on(job, undisturbed)


def late(attack: kinds.Attack) -> kinds.Attack:
    """Return the attack at a later time, when there is a checkpoint to resume from."""
    assert attack.fault is not None
    # A save runs in the background, and the next one waits for it. So the save of step 4 is on disk after step 8.
    later = {
        name: least + attack.fault.get(name, 0) for name, least in (("step", 8), ("save", 1)) if name in attack.fault
    }
    return replace(attack, fault={**attack.fault, **later})


def go_on(job: Job, undisturbed: Job, message: str = "") -> None:
    """Start the job again; it must print ``message``, finish, and equal the undisturbed job."""
    checkpoints = job.checkpoints()
    ending = job.start()
    assert ending.status == 0 and not ending.errors and message in ending.output, ending.output[-6000:]
    if checkpoints and not message:
        assert ending.resumed_from == checkpoints[-1].name, "the newest checkpoint is not used"
    assert differences(job, undisturbed) == []


def test_a_job_with_another_seed_is_found_different(
    nursery: Nursery, world: Path, tmp_path: Path, undisturbed: Job
) -> None:
    other = Job(nursery, tmp_path / "other", world, "run.seed=2")
    assert other.start().status == 0
    found = " ".join(differences(other, undisturbed))
    for part in ("table_optimizer", "exp_avg", "rank-00001.pt", "trace", "metrics", "rows of the steps of rank 0"):
        assert part in found


@pytest.mark.parametrize(
    "draw",
    [
        kinds.kill_rank,
        kinds.terminate,
        *(
            pytest.param(draw, marks=SLOW)
            for draw in (kinds.kill_all, kinds.kill_launcher, kinds.kill_worker, kinds.write_error)
        ),
    ],
)
def test_the_same_command_goes_on_after(draw: kinds.Draw, job: Job, undisturbed: Job) -> None:
    endure(job, late(draw(random.Random(draw.__name__), job)), undisturbed)
    assert "resuming from" in (job.directory / "out-2").read_text()


@pytest.mark.parametrize(
    "draw",
    [
        kinds.kill_in_evaluation,
        kinds.stop_in_removal,
        kinds.full_disk,
        *(pytest.param(draw, marks=SLOW) for draw in (kinds.kill_in_start, kinds.break_shard)),
    ],
)
def test_the_same_command_goes_on_at_any_time_after(draw: kinds.Draw, job: Job, undisturbed: Job) -> None:
    endure(job, draw(random.Random(draw.__name__), job), undisturbed)


@pytest.mark.parametrize(
    "file", [file if file == "manifest.json" else pytest.param(file, marks=SLOW) for file in FILES]
)
def test_a_stop_in_a_save_leaves_the_checkpoint_before_it(file: str, job: Job, undisturbed: Job) -> None:
    endure(job, late(kinds.stop_in_save(random.Random(file), job, file)), undisturbed)


@pytest.mark.parametrize("stopped", [False, pytest.param(True, marks=SLOW)])
def test_the_watchdog_ends_a_job_that_hangs(stopped: bool, job: Job, undisturbed: Job) -> None:
    endure(job, late(kinds.hang(random.Random(2), job, stopped)), undisturbed)


def test_a_loss_that_is_not_a_number_is_not_learnt_from_and_its_rows_are_kept(job: Job, undisturbed: Job) -> None:
    endure(job, late(kinds.not_a_number(random.Random(1), job)), undisturbed)
    (directory,) = (job.run / "not-finite").iterdir()
    step = int(directory.name.removeprefix("step-"))
    for rank in range(RANKS):
        kept = torch.load(directory / f"rank-{rank:05d}.pt", weights_only=True)
        assert kept["visit_id"].tolist() == trained_rows(undisturbed, rank)[step]


@pytest.mark.parametrize(
    ("file", "harm"),
    [
        ("manifest.json", "missing"),
        pytest.param("model/.metadata", "zeroed", marks=SLOW),
        ("model/__1_0.distcp", "truncated"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(file: str, harm: str, stopped: Job, undisturbed: Job) -> None:
    attack = kinds.damage_newest(random.Random(file), stopped, file, harm)
    go_on(stopped, undisturbed, attack.message)


def test_a_stop_while_a_damaged_checkpoint_is_replaced_leaves_one_of_the_two(stopped: Job, undisturbed: Job) -> None:
    endure(stopped, kinds.stop_in_replacement(random.Random(1), stopped), undisturbed)


def test_the_command_itself_is_preempted_and_resumes(limelight: Any, job: Job, undisturbed: Job) -> None:
    status, printed = run_forked(job, 4, lambda launcher: os.kill(launcher, signal.SIGTERM))
    assert status == PREEMPTED_STATUS and "stopped by SIGTERM" in printed, printed
    ended = limelight("train", *job.arguments, "--ranks", 2)
    printed = ended.stdout + ended.stderr
    assert "resuming from " in printed and "limelight: " not in printed, printed
    assert (job.run / "report.html").exists()
    assert state_differences(job, undisturbed) == []


@SLOW
def test_the_command_itself_is_killed_and_preempted_and_goes_on(job: Job, undisturbed: Job) -> None:
    command = Command(job)
    try:
        status, output = command.run(4, lambda launcher, ranks: os.kill(ranks[1], signal.SIGKILL))
        assert status == 128 + signal.SIGKILL, output
        assert "limelight: rank 1 was ended by SIGKILL (out of memory?)" in output and "Traceback" not in output

        status, output = command.run(16, lambda launcher, ranks: os.kill(launcher, signal.SIGTERM))
        assert status == PREEMPTED_STATUS, output
        assert "resuming from " in output and "stopped by SIGTERM" in output

        status, output = command.run(16, lambda launcher, ranks: None)
        assert status == 0 and "limelight: " not in output, output
    finally:
        command.kill()
    assert (job.run / "report.html").exists()
    assert state_differences(job, undisturbed) == []
