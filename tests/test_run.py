"""The run directory, and what people see: progress lines, the table, the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.config import parse_config
from trainer.errors import UserError
from trainer.progress import Progress
from trainer.report import PHASES, metrics_table, write_report
from trainer.run import choose_directory, create_run, load_run, write_json

CONFIG = parse_config({"data": {"path": "d"}, "run": {"name": "n"}}, "test")


def test_a_run_reads_back_once_it_has_a_model(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    create_run(run, CONFIG, world=2)
    assert json.loads((run / "environment.json").read_text())["ranks"] == 2
    with pytest.raises(UserError, match="has no model"):
        load_run(run)
    create_run(run, CONFIG, world=1)
    (run / "model").mkdir()
    assert load_run(run) == CONFIG
    with pytest.raises(UserError, match="a run is already here"):
        create_run(run, CONFIG, world=2)


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run here"):
        load_run(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_run(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        create_run(tmp_path / "file" / "run", CONFIG, world=1)


def test_directories_are_named_after_the_run() -> None:
    assert choose_directory(CONFIG).name.startswith("n-")
    given = CONFIG.model_copy(update={"run": CONFIG.run.model_copy(update={"directory": "a/b"})})
    assert choose_directory(given) == Path("a/b")


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_progress_elsewhere_than_on_a_terminal_is_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("trainer.progress.time.monotonic", lambda: now[0])
    with Progress("train", 1000, "rows") as progress:
        for _ in range(10):
            now[0] += 2.0
            progress.advance(50, "loss 0.5")
    lines = capsys.readouterr().out.splitlines()
    # A line every five seconds at most, and one at the end.
    assert lines[0] == "train: 150/1,000 rows (15 %), 25 rows/s, 0:06 so far, ETA 0:34, loss 0.5"
    assert len(lines) == 4
    assert lines[-1].startswith("train: 500/1,000 rows (50 %), 25 rows/s, 0:20 so far, ETA 0:20")
    with Progress("train", 10, "rows", quiet=True) as progress:
        now[0] += 100
        progress.advance(10)
    assert capsys.readouterr().out == ""


def test_progress_goes_on_where_an_earlier_process_stopped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("trainer.progress.time.monotonic", lambda: now[0])
    with Progress("train", 1000, "rows", done=400) as progress:
        now[0] += 10
        progress.advance(100)
    assert capsys.readouterr().out.startswith("train: 500/1,000 rows (50 %), 10 rows/s, 0:10 so far, ETA 0:50\n")


METRICS = {"auc": 0.71234, "gauc": None, "uauc": 0.6, "logloss": 0.5, "ne": 0.9, "calibration": 1.01, "positives": 1234}


def test_undefined_is_a_dash_and_models_share_a_table() -> None:
    report = {"click": {**METRICS, "rows": 99}, "like": {**METRICS, "rows": 99}}
    alone = metrics_table({"ple": report}).splitlines()
    assert alone[0].split() == ["behaviour", "auc", "gauc", "uauc", "logloss", "ne", "calibration", "positives", "rows"]
    assert alone[1].split() == ["click", "0.7123", "-", "0.6000", "0.5000", "0.9000", "1.0100", "1,234", "99"]
    both = metrics_table({"ple": report, "mmoe": {"click": {**METRICS, "best_auc": 0.8}, "like": METRICS}}).splitlines()
    assert [line.split()[:2] for line in both[1:]] == [
        ["click", "ple"],
        ["click", "mmoe"],
        ["like", "ple"],
        ["like", "mmoe"],
    ]
    assert both[0].split()[-1] == "best_auc"
    assert len({len(line) for line in both}) == 1


def test_the_report_is_one_file_with_its_pictures(tmp_path: Path) -> None:
    entry = {"loss": 0.5, "rows_per_second": 100.0, "auc": {"click": 0.6}, **dict.fromkeys(PHASES, 1.0)}
    write_report(
        tmp_path / "report.html",
        title="a <run>",
        config={"data": {"path": "d"}},
        models={"ple": {"click": {**METRICS, "rows": 99}}},
        trace=[{"step": step, **entry} for step in (1, 2)],
        plan=[{"table": "user", "sharding": "row_wise"}],
        calibration={"click": [(0.1, 0.2, 10), (0.3, 0.25, 10)]},
    )
    text = (tmp_path / "report.html").read_text()
    assert "a &lt;run&gt;" in text
    assert text.count("data:image/svg+xml;base64,") == 4
    assert "http" not in text.replace("http-equiv", "")
    assert "row_wise" in text and "0.7123" in text


def test_a_report_without_rows_or_metrics_is_still_one(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", title="empty", config={}, models={}, trace=[], plan=[], calibration={})
    assert "no held-out range" in (tmp_path / "report.html").read_text()
