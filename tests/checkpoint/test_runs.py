"""Lists of runs: every kind and state, damaged ones, and the order by a metric."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from trainer.checkpoint import runs
from trainer.checkpoint.runs import RunSummary, describe_state, find_runs, format_runs, list_runs, summarize
from trainer.console.errors import UserError
from trainer.runtime.run_lock import locked
from trainer.runtime.run_status import STATUS, record_failure, recorded_status

CLICK = {"auc": 0.7, "gauc": None, "logloss": 0.5, "calibration": 0.9, "rows": 10}


def write_run(directory: Path, config: dict[str, Any] | None = None, metrics: dict[str, Any] | None = None) -> Path:
    """Write the files of a run of an earlier version, which has no status."""
    directory.mkdir(parents=True)
    (directory / "environment.json").write_text('{"starts": [{"started": "2026-11-30T04:06:38+0000"}]}')
    (directory / "config.json").write_text(json.dumps({"train": {}} if config is None else config))
    if metrics is not None:
        (directory / "metrics.json").write_text(json.dumps(metrics))
    return directory


@pytest.mark.parametrize(
    ("config", "metrics", "job", "shown"),
    [
        ({}, {"behaviours": {"click": CLICK}}, "train", {"click.auc": 0.7}),
        ({}, {"behaviours": {}, "stream": {"progressive": {"like": CLICK}}}, "train", {"like.auc": 0.7}),
        (
            {"lora": {}},
            {"evaluation": {"task": {"model": {"accuracy": 0.5}}}},
            "finetune",
            {"task.model.accuracy": 0.5},
        ),
        ({"towers": {}, "evaluate": {}}, {"retrieval": {"all": {"mrr": 0.1}}}, "align", {"all.mrr": 0.1}),
        (
            {"evaluate": {}},
            {"evaluation": {"quality": {"all": {"model": {"top_1": 0.2}, "last": {"top_1": 0.1}}}}},
            "foresight",
            {"all.model.top_1": 0.2},
        ),
        ({"lcu": {}}, {"all": {"rmse": 8.6}}, "staytime", {"rmse": 8.6}),
    ],
)
def test_a_finished_run_of_every_kind_has_its_metrics(
    tmp_path: Path, config: dict[str, Any], metrics: dict[str, Any], job: str, shown: dict[str, float]
) -> None:
    run = summarize(write_run(tmp_path / "run", config, metrics | {"training": {"rows_per_second": 12.0, "steps": 3}}))
    assert (run.job, run.state, run.reason, run.rows_per_second, run.steps) == (job, "finished", "", 12.0, 3)
    assert {name: run.metrics[name] for name in run.shown} == shown
    assert run.started == "2026-11-30T04:06:38+00:00"
    assert f"{next(iter(shown))} {next(iter(shown.values())):.4f}" in format_runs([run])


def test_a_run_with_a_baseline_that_is_not_done_has_not_finished(tmp_path: Path) -> None:
    config = {"model": {"kind": "ple"}, "train": {"baselines": ["ple", "logistic"]}}
    run = write_run(tmp_path / "run", config, {"behaviours": {}})
    assert summarize(run).state == "stopped"
    (run / "baselines" / "logistic").mkdir(parents=True)
    (run / "baselines" / "logistic" / "metrics.json").write_text("{}")
    assert summarize(run).state == "finished"


def test_a_run_that_was_killed_has_failed_and_one_that_works_is_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run")
    (run / "checkpoints" / "step-00000120").mkdir(parents=True)
    with recorded_status(run, "train", 0, 1):
        left_behind = (run / STATUS).read_text()
    assert "earlier version" in summarize(write_run(tmp_path / "old")).reason
    status = json.loads(left_behind) | {
        "step": 130,
        "work": {"label": "train", "done": 5, "total": 10, "unit": "rows", "per_second": 2.5, "seconds_left": 65.0},
    }
    (run / STATUS).write_text(json.dumps(status))
    killed = summarize(run)
    assert (killed.state, killed.steps) == ("failed", 120) and "killed" in killed.reason
    with locked(run):
        # The lock of this process is not one of another process.
        monkeypatch.setattr(runs, "is_locked", lambda directory: True)
        running = summarize(run)
    assert (running.state, running.steps, running.rows_per_second) == ("running", 130, 2.5)
    now = datetime.fromisoformat(running.updated)
    described = describe_state(running, now)
    assert described.startswith("running, process ") and described.endswith(", train 50 %, ETA 1:05")
    assert describe_state(running, now + timedelta(hours=2)).endswith("ETA 1:05, no sign for 2.0 h")


def test_a_failure_is_a_line_below_the_table(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(UserError), recorded_status(run, "train", 0, 1):
        raise UserError("the loss of step 3 is nan")
    table, _, note = format_runs([summarize(run)]).partition("\n\n")
    assert "failed" in table and note == f"{run}: failed: the loss of step 3 is nan"
    with recorded_status(run, "train", 0, 1):
        record_failure("rank 1 hangs")
    assert summarize(run).reason == "rank 1 hangs"


@pytest.mark.parametrize("name", ["config.json", "metrics.json", "status.json", "environment.json"])
@pytest.mark.parametrize("content", ["{", "[]", '"a"'])
def test_damage_is_a_row_and_no_error(tmp_path: Path, name: str, content: str) -> None:
    write_run(tmp_path / "good")
    (write_run(tmp_path / "wrong", metrics={}) / name).write_text(content)
    good, wrong = list_runs(tmp_path)
    assert (good.state, wrong.state) == ("stopped", "damaged") and name in wrong.reason
    assert format_runs([good, wrong]).count("\n") == 5


@pytest.mark.parametrize("value", [None, 1, "a", [], {}, [1], [{}], {"a": {"b": "c"}}, {"training": 3}])
def test_values_of_other_types_are_no_error(tmp_path: Path, value: Any) -> None:
    for key in ("behaviours", "stream", "training"):
        run = write_run(tmp_path / key / "run", {"train": value, "model": value}, {key: value})
        (run / "environment.json").write_text(json.dumps({"starts": value}))
        summary = summarize(run)
        assert summary.state in ("finished", "stopped")
        assert format_runs([summary]) and json.dumps(summary.document())


def test_runs_are_found_by_what_every_job_writes(tmp_path: Path) -> None:
    write_run(tmp_path / "b" / "run")
    write_run(tmp_path / "b" / "run" / "follow")
    write_run(tmp_path / "b" / "run" / "checkpoints" / "step-00000001" / "no run")
    write_run(tmp_path / ".hidden")
    write_run(tmp_path / "a1" / "2" / "3" / "4" / "too deep")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text("{}")
    (tmp_path / "embed").mkdir()
    (tmp_path / "embed" / "lock").touch()
    (tmp_path / "link").symlink_to(tmp_path / "b")
    found = [str(run.relative_to(tmp_path)) for run in find_runs(tmp_path)]
    assert found == ["b/run", "b/run/follow", "embed"]
    assert next(find_runs(tmp_path / "b" / "run")) == tmp_path / "b" / "run"
    assert summarize(tmp_path / "embed").reason.endswith("no config.json")


def test_the_best_run_comes_first(tmp_path: Path) -> None:
    for name, auc, calibration in (("a", 0.6, 1.3), ("b", 0.8, 0.5), ("c", 0.7, 1.01)):
        click = {"auc": auc, "logloss": auc, "calibration": calibration}
        write_run(tmp_path / name, metrics={"behaviours": {"like": {"gauc": 0.5}, "click": click}})
    write_run(tmp_path / "none")

    def order(sort: str) -> str:
        return "".join(Path(run.directory).name[0] for run in list_runs(tmp_path, sort))

    assert order("") == "abcn"
    assert order("click.auc") == order("auc") == "bcan"
    assert order("logloss") == "acbn" and order("calibration") == "cabn" and order("started") == "abcn"
    assert "like.gauc" not in format_runs(list_runs(tmp_path, "logloss")[:1], "logloss")
    assert "click.logloss 0.6000  click.auc 0.6000" in format_runs(list_runs(tmp_path, "logloss"), "logloss")
    with pytest.raises(UserError, match=r"--sort nonsense: .* like\.gauc, click\.auc"):
        list_runs(tmp_path, "nonsense")
    with pytest.raises(UserError, match="no such directory"):
        list_runs(tmp_path / "nowhere")


def test_a_name_cannot_write_to_the_terminal() -> None:
    run = RunSummary(
        "a\x1b[2Jb", job="train", state="failed", reason="x\ny", metrics={"\x07.auc": 1.0}, shown=("\x07.auc",)
    )
    text = format_runs([run])
    assert "\x1b" not in text and "\x07" not in text and text.count("\n") == 3
    assert describe_state(RunSummary("a", state="stopped"), datetime.now(UTC)) == "stopped"
