"""The ends of jobs in an MLflow file store: told by the job, or by the process that waits for its end."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.forked import ForkedJob
from tests.runtime.recorded_mlflow import RecordedRun
from trainer.console.errors import UserError
from trainer.console.exit_status import Terminated
from trainer.runtime import tracking
from trainer.runtime.mlflow_keeper import mark_killed
from trainer.runtime.mlflow_store import REASON, MlflowRun, MlflowTarget
from trainer.runtime.preemption import Preempted
from trainer.runtime.run_lock import locked
from trainer.runtime.run_status import KILLED_REASON, read_status, record_failure, recorded_status
from trainer.runtime.scalars import open_scalars
from trainer.runtime.tracking import record_scalars, tracked, tracked_run

TARGET = MlflowTarget("store", "small", "run", {})

ENDS = [
    (UserError("the loss is nan"), ("failed", "the loss is nan")),
    (ValueError("a\nb"), ("failed", "ValueError: a b")),
    (Preempted(), ("stopped", "SIGTERM")),
    (Terminated(), ("stopped", "SIGTERM")),
    (KeyboardInterrupt(), ("stopped", "ctrl-C")),
]


@pytest.mark.parametrize(("error", "end"), ENDS, ids=lambda value: type(value).__name__)
def test_an_exception_is_the_end_of_each_open_run_but_of_one_with_metrics(
    error: BaseException, end: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = RecordedRun.in_place_of_mlflow(monkeypatch)
    baseline = tmp_path / "baselines" / "mmoe"
    with (
        pytest.raises(type(error)),
        recorded_status(tmp_path, "train", 0, 1),
        tracked(tmp_path, TARGET),
    ):
        record_scalars({"loss": 2.0}, 1)
        (tmp_path / "metrics.json").write_text("{}")
        with tracked(baseline, TARGET):
            record_scalars({"loss": 1.0}, 1)
            raise error
    assert [run.ends for run in runs] == [[("finished", "")], [end]]
    assert [run.scalars for run in runs] == [[("loss", 2.0, 1)], [("loss", 1.0, 1)]]
    assert tracked_run() is None


LOST = RuntimeError("[pair.cc:1] gloo/transport/tcp: Connection closed by peer [127.0.0.1]:1")


@pytest.mark.parametrize("error", [LOST, Terminated(), Preempted()], ids=lambda value: type(value).__name__)
def test_the_reason_is_that_of_the_rank_that_failed_first(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = RecordedRun.in_place_of_mlflow(monkeypatch)
    with pytest.raises(type(error)), recorded_status(tmp_path, "train", 0, 2), tracked(tmp_path, TARGET):
        (tmp_path / "failure.json").write_text(json.dumps({"rank": 1, "reason": "no space"}))
        raise error
    status = read_status(tmp_path)
    assert status is not None and runs[0].ends == [(status.state, status.reason)] == [("failed", "rank 1: no space")]


def refuse(*words: object) -> None:
    """Fail as a store does whose disk is full."""
    raise UserError("run.mlflow = 'store': no space")


def test_a_store_that_fails_while_the_job_runs_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runs = RecordedRun.in_place_of_mlflow(monkeypatch)

    with tracked(tmp_path, TARGET):
        writer = open_scalars(tmp_path / "tensorboard", 0)
        with monkeypatch.context() as full:
            for name in ("add_scalar", "flush", "close"):
                full.setattr(runs[0], name, refuse)
            # The rankers' writer, the one of the other loops, and the values of a whole epoch.
            writer.add_scalar("loss", 3.0, 1)
            writer.flush()
            tracked_run().add_scalar("loss", 2.0, 2)  # type: ignore[union-attr]
            record_scalars({"loss": 1.0}, 3)
        # There is room again.
        record_scalars({"auc": 0.5}, 4)
        writer.close()
        monkeypatch.setattr(runs[0], "end", refuse)
    assert [record.getMessage() for record in caplog.records] == [
        "run.mlflow = 'store': no space; the job goes on, and its own files are complete"
    ]
    assert runs[0].scalars == [("auc", 0.5, 4)]
    (board,) = (tmp_path / "tensorboard").iterdir()
    assert board.stat().st_size > 100, "TensorBoard has the value"


def test_a_baseline_that_cannot_be_opened_is_a_warning_and_the_job_itself_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runs = RecordedRun.in_place_of_mlflow(monkeypatch)

    with tracked(tmp_path, TARGET):
        with monkeypatch.context() as full:
            full.setattr(tracking, "MlflowRun", refuse)
            with tracked(tmp_path / "baselines" / "mmoe", TARGET):
                record_scalars({"loss": 1.0}, 1)
        record_scalars({"auc": 0.5}, 2)
    assert [(run.scalars, run.ends) for run in runs] == [([("auc", 0.5, 2)], [("finished", "")])]
    (warning,) = (record.getMessage() for record in caplog.records)
    assert warning.startswith("run.mlflow = 'store': no space; the job goes on, and ") and "mmoe" in warning
    monkeypatch.setattr(tracking, "MlflowRun", refuse)
    with pytest.raises(UserError, match="no space"), tracked(tmp_path, TARGET):
        pass
    assert tracked_run() is None


def test_without_a_store_nothing_is_written(tmp_path: Path) -> None:
    with tracked(tmp_path, None):
        record_scalars({"loss": 1.0}, 1)
        assert tracked_run() is None
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow = pytest.importorskip("mlflow", reason="needs the package mlflow-skinny, of the extra mlflow")
    return mlflow.MlflowClient((tmp_path / "store").as_uri())


def run_job(directory: Path, store: str, act: str) -> None:
    """Run a job with a file store, which ends or hangs as ``act`` says after it has printed a line."""
    with (
        locked(directory),
        recorded_status(directory, "train", 0, 1),
        tracked(directory, MlflowTarget(store, "small", "run", {})),
    ):
        record_scalars({"loss": 2.0}, 1)
        if act == "hang":
            record_failure("rank 0 hangs")
        if act in ("fork", "raise") and not os.fork():
            # Such as a loader process, which holds the pipe to the keeper open.
            time.sleep(600)
        print("ready")
        if act == "raise":
            raise ValueError("the loss is nan")
        if act != "end":
            time.sleep(600)


@pytest.fixture
def jobs() -> Iterator[list[ForkedJob]]:
    started: list[ForkedJob] = []
    yield started
    for job in started:
        job.close()


def test_the_run_of_a_killed_job_does_not_stay_running_and_is_continued(
    tmp_path: Path, client: Any, jobs: list[ForkedJob]
) -> None:
    directory = tmp_path / "run"
    directory.mkdir()

    def start(act: str) -> ForkedJob:
        jobs.append(ForkedJob(lambda: run_job(directory, str(tmp_path / "store"), act)))
        assert jobs[-1].stdout.readline() == "ready\n"
        return jobs[-1]

    def info() -> tuple[str, str | None]:
        run = client.get_run(json.loads((directory / "mlflow.json").read_text())["run_id"])
        return run.info.status, run.data.tags.get(REASON)

    def kill(act: str) -> tuple[str, str | None]:
        job = start(act)
        assert info() == ("RUNNING", None), "the reason of an earlier end has gone"
        os.kill(job.pid, signal.SIGKILL)
        job.wait()
        until = time.monotonic() + 60
        while info()[0] == "RUNNING" and time.monotonic() < until:
            time.sleep(0.05)
        return info()

    assert kill("fork") == ("KILLED", KILLED_REASON)
    first = json.loads((directory / "mlflow.json").read_text())
    assert kill("hang") == ("FAILED", "rank 0 hangs")
    assert start("raise").wait() == 1
    assert info() == ("FAILED", "ValueError: the loss is nan")
    assert start("end").wait() == 0
    assert info() == ("FINISHED", None)
    assert json.loads((directory / "mlflow.json").read_text()) == first
    assert len(client.get_metric_history(first["run_id"], "loss")) == 4


def test_a_killed_job_is_marked_by_what_its_directory_says(tmp_path: Path, client: Any) -> None:
    store, directory = tmp_path / "store", tmp_path / "run"
    directory.mkdir()
    target = MlflowTarget(str(store), "small", "run", {})

    def marked(name: str) -> tuple[str, str | None]:
        run = MlflowRun(tmp_path / name, target).run_id
        mark_killed(str(store), run, directory, tmp_path / name)
        found = client.get_run(run)
        return found.info.status, found.data.tags.get(REASON)

    assert marked("no status") == ("KILLED", KILLED_REASON)
    with recorded_status(directory, "train", 0, 1):
        assert marked("running") == ("KILLED", KILLED_REASON)
        record_failure("it hangs")
        assert marked("failed") == ("FAILED", "it hangs")
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "metrics.json").write_text("{}")
    assert marked("done") == ("FINISHED", None)
    with suppress(Terminated), recorded_status(directory, "embed", 0, 1):
        raise Terminated
    assert marked("stopped") == ("KILLED", "SIGTERM")
    with recorded_status(directory, "embed", 0, 1):
        pass
    assert marked("finished") == ("FINISHED", None)
