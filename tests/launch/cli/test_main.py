"""The ``limelight`` command: light to start, one line for a mistake, statuses that shells know."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch import local
from launch.cli.main import main
from tests.paths import ROOT
from trainer.console.errors import UserError

HEAVY = ("torch", "torchrec", "deepspeed", "fbgemm_gpu", "numpy", "pyarrow", "pydantic", "matplotlib", "webdataset")

JOB = """
[data]
path = "nowhere"
"""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str], int]]:
    """What would have been started, instead of starting it."""
    calls: list[tuple[str, list[str], int]] = []

    def start_ranks(module: str, arguments: Sequence[str], ranks: int) -> int:
        calls.append((module, list(arguments), ranks))
        return 0

    monkeypatch.setattr(local, "start_ranks", start_ranks)
    return calls


@pytest.fixture
def job(tmp_path: Path) -> str:
    file = tmp_path / "job.toml"
    file.write_text(JOB)
    return str(file)


def limelight(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli.main", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_help_and_mistakes_load_nothing_heavy() -> None:
    call = (
        f"import sys; from launch.cli.main import build_parser; build_parser(); print({HEAVY!r} & sys.modules.keys())"
    )
    call = call.replace(repr(HEAVY), f"set({HEAVY!r})")
    done = subprocess.run([sys.executable, "-c", call], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_help_names_every_verb() -> None:
    process = limelight("--help")
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0 and not stderr
    assert all(verb in stdout for verb in ("data", "train", "evaluate", "score", "doctor"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "the following arguments are required: VERB"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "the following arguments are required: CONFIG"),
        (["train", "x.toml", "--ranks", "0"], "'0' is not a number of processes, 1 or more"),
        (["train", "x.toml", "--ranks", "two"], "'two' is not a number of processes"),
        (["train", "x.toml", "--rank", "2"], "unrecognized arguments: --rank"),
        (["score", "run"], "the following arguments are required: CANDIDATES.parquet, OUT.parquet"),
        (["doctor", "--ranks", "2"], "unrecognized arguments: --ranks=2"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str], started: list[object]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main.main(arguments)
    assert stop.value.code == 2 and not started
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("limelight: error: ") and told in line and "--help shows what is accepted" in line


@pytest.mark.parametrize("place", [1, 2, 3])
def test_ranks_may_stand_anywhere(place: int, job: str, started: list[tuple[str, list[str], int]]) -> None:
    arguments = [job, "train.epochs=2", "data.workers=0"]
    assert main.main(["train", *arguments[:place], "--ranks", "3", *arguments[place:]]) == 0
    assert started == [("trainer.rank", arguments, 3)]


def test_one_rank_unless_asked(job: str, started: list[tuple[str, list[str], int]]) -> None:
    assert main.main(["train", job]) == 0
    assert started == [("trainer.rank", [job], 1)]


def test_a_mistake_in_the_job_starts_nothing(
    job: str, started: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["train", job, "train.epoch=2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("limelight: error: ") and "unknown key train.epoch" in line and "train.epochs" in line
    assert not started


def test_evaluate_and_score_hand_their_arguments_on(started: list[tuple[str, list[str], int]]) -> None:
    asked = ["runs/a", "--data", "d", "--from", "2022-05-04", "--until", "2022-05-06", "--json"]
    assert main.main(["evaluate", *asked, "--ranks=2"]) == 0
    assert main.main(["score", "runs/a", "in.parquet", "out.parquet"]) == 0
    assert started == [("trainer.evaluate", asked, 2), ("trainer.score", ["runs/a", "in.parquet", "out.parquet"], 1)]


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (UserError("disk: full"), 2, "limelight: error: disk: full\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_end_as_statuses(
    error: BaseException,
    status: int,
    told: str,
    job: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def start_ranks(module: str, arguments: Sequence[str], ranks: int) -> int:
        raise error

    monkeypatch.setattr(local, "start_ranks", start_ranks)
    assert main.main(["train", job]) == status
    assert capsys.readouterr().err == told


def test_a_status_is_passed_through(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "start_ranks", lambda module, arguments, ranks: 137)
    assert main.main(["train", job]) == 137


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("size", [1, 100_000])
def test_a_reader_that_left_is_no_matter(size: int, unbuffered: str) -> None:
    call = f"import sys; from launch import cli; cli._doctor = lambda options: print('x' * {size})"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", f"{call}; sys.exit(cli.main(['doctor']))"],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (main.BROKEN_PIPE_STATUS, "")


def test_a_broken_pipe_elsewhere_is_an_error(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def start_ranks(module: str, arguments: Sequence[str], ranks: int) -> int:
        raise BrokenPipeError("to a worker")

    monkeypatch.setattr(local, "start_ranks", start_ranks)
    with pytest.raises(BrokenPipeError, match="to a worker"):
        main.main(["train", job])
