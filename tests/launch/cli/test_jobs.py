"""``limelight train``, ``finetune``, ``embed``: what starts, with which arguments, and what does not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from launch import local
from launch.cli.main import main
from trainer.console.errors import UserError

JOBS = {
    "train": '[data]\npath = "nowhere"\n',
    "finetune": '[data]\ntrain = ["nowhere.jsonl"]\n',
    "embed": '[data]\npath = "nowhere"\n[model]\npath = "m"\n[embed]\ndirectory = "d"\n',
}
MODULES = {"train": "trainer.rank", "finetune": "trainer.finetune", "embed": "trainer.embed"}

Started = list[tuple[str, list[str], int]]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """Record what would be started, instead of starting it."""
    calls: Started = []

    def start_ranks(module: str, arguments: Sequence[str], ranks: int) -> int:
        calls.append((module, list(arguments), ranks))
        return 0

    monkeypatch.setattr(local, "start_ranks", start_ranks)
    return calls


@pytest.fixture(params=JOBS)
def job(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[str, str]:
    """The name of a command, and a job file of it."""
    file = tmp_path / "job.toml"
    file.write_text(JOBS[request.param])
    return request.param, str(file)


@pytest.mark.parametrize("place", [0, 1, 2, 3])
@pytest.mark.parametrize("option", [["--ranks", "3"], ["--ranks=3"]], ids=" ".join)
def test_ranks_may_stand_anywhere(place: int, option: list[str], job: tuple[str, str], started: Started) -> None:
    name, file = job
    overrides = {
        "train": ["train.epochs=2", "data.workers=0"],
        "finetune": ["train.epochs=2", "lora.rank=4"],
        "embed": ["embed.length=9", "embed.seed=3"],
    }[name]
    arguments = [file, *overrides]
    assert main([name, *arguments[:place], *option, *arguments[place:]]) == 0
    assert started == [(MODULES[name], arguments, 3)]


def test_one_rank_unless_more_are_asked_for(job: tuple[str, str], started: Started) -> None:
    name, file = job
    assert main([name, file]) == 0
    assert started == [(MODULES[name], [file], 1)]


def test_a_mistake_in_the_job_starts_nothing(
    job: tuple[str, str], started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    name, file = job
    assert main([name, file, "data.pth=x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("limelight: error: ") and "unknown key data.pth" in line
    assert not started


def test_arguments_of_evaluate_and_explain_reach_their_ranks(started: Started) -> None:
    arguments = ["runs/a", "--data", "d", "--from", "2022-05-04", "--until", "2022-05-06", "--json"]
    assert main(["evaluate", *arguments[:1], "--ranks=2", *arguments[1:]]) == 0
    assert main(["explain", "runs/a", "--user", "0", "--candidate", "4"]) == 0
    assert started == [
        ("trainer.evaluate", arguments, 2),
        ("trainer.explain", ["runs/a", "--user", "0", "--candidate", "4", "--top", "10"], 1),
    ]


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
    job: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def start_ranks(module: str, arguments: Sequence[str], ranks: int) -> int:
        raise error

    monkeypatch.setattr(local, "start_ranks", start_ranks)
    assert main(list(job)) == status
    assert capsys.readouterr().err == told


def test_the_status_of_a_job_is_passed_through(job: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "start_ranks", lambda module, arguments, ranks: 137)
    assert main(list(job)) == 137
