"""The page about a run: its content, texts of other people, runs that are not whole."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.paths import ROOT
from tests.report.page_elements import PageElements
from tests.report.stored_runs import write_model, write_ranker
from trainer.checkpoint import runs
from trainer.console.errors import UserError
from trainer.console.exit_status import Terminated
from trainer.console.outputs import Output
from trainer.report import run_report
from trainer.report.run_report import make_report, write_last_report, write_report
from trainer.runtime.run_status import recorded_status

EVIL = "</script><img src=x onerror=alert(1)>&"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ranker(tmp_path_factory.mktemp("runs") / "small")


@pytest.fixture(scope="module")
def page(finished: Path) -> str:
    return make_report(finished)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make pages whose intervals nobody reads."""
    monkeypatch.setattr("trainer.report.ranker_sections.metrics_with_intervals", lambda held_out: {})
    monkeypatch.setattr("trainer.report.ranker_sections.parts_of", lambda held_out: [])


def test_the_page_shows_the_run(page: str) -> None:
    found = PageElements(page)
    for heading in (
        "Held-out metrics",
        "Where it is good and bad",
        "Training",
        "One room over time",
        "What the model attends to",
        "Calibration",
        "Throughput",
        "Embedding tables",
        "Job",
        "Where it ran",
    ):
        assert heading in found.texts
    for text in ("small: mmoe", "finished", "2,000", "best possible", "logistic", "row_wise", "64.0 kB"):
        assert text in found.texts, text
    assert re.search(r"<td[^>]*>0\.\d{4} \(0\.\d{4}, 0\.\d{4}\)</td>", page), "an interval"
    assert "<mark>kind = &#34;mmoe&#34;  # default: &#34;ple&#34;</mark>" in page


def test_the_page_warns_of_what_matters(page: str) -> None:
    warnings = page[page.index('aria-label="Warnings"') :].partition("</ul>")[0]
    for words in (
        "gift has ",
        "2.4 % of the rows were skipped",
        "waited for data in 40 %",
        "stopped the training for 22 % of the time",
        "80 % of the look-ups in the table item found no row",
    ):
        assert words in warnings, words
    assert "click" not in warnings


@pytest.mark.parametrize(
    ("ids", "rows", "known", "warned"),
    [
        ("lookup", 4, [0], "83 % of the held-out rows have an unknown item"),
        ("lookup", 4, [0, 1, 2, 3], ""),
        ("direct", 3, None, "67 % of the held-out rows have an unknown item"),
        ("direct", 7, None, ""),
        ("hash", 3, None, "100 % of the held-out ids of the table item share their row"),
        ("hash", 1_000_000, None, ""),
    ],
)
def test_ids_that_are_unknown_or_share_rows_are_a_warning(
    run: Path, few_draws: None, ids: str, rows: int, known: list[int] | None, warned: str
) -> None:
    config = json.loads((run / "config.json").read_text())
    config["features"]["item"]["ids"] = ids
    (run / "config.json").write_text(json.dumps(config))
    (run / "plan.json").write_text(json.dumps([{"table": "item", "rows": rows, "dim": 4}]))
    if known is not None:
        (run / "features").mkdir()
        np.savez(run / "features" / "vocabularies.npz", item=np.array(known))
    page = make_report(run)
    assert warned in page and ("have an unknown item" in page or "share their row" in page) == bool(warned)


def test_a_room_has_its_predicted_observed_and_true_curve(page: str) -> None:
    (label,) = [
        str(attributes["aria-label"])
        for attributes in PageElements(page).of("svg")
        if "in item 0" in str(attributes.get("aria-label"))
    ]
    assert label.startswith("Probability of click in item 0: predicted 0.") and "observed 0." in label
    assert "true 0." in label
    assert "The item with the most held-out visits (200), in 10 groups of equally many visits." in page


def test_the_attention_of_a_few_rows_is_told_in_words_and_as_tables(page: str) -> None:
    found = PageElements(page)
    for text in (
        "User 12 met author 7 for the 3rd time",
        "The user did click. Predicted were click 62 %, gift 1.3 %. In the history live, 41 % of the attention is on "
        "one of 20 visits: to the same author, 2.0 days ago (click, gift).",
        "live 70 of author 7 (same author, author_category)",
        "User 13 met author 7 for the 11th time",
        "The user did nothing that is predicted. Predicted were click 5.0 %. The attention to the past visits is about "
        "even.",
    ):
        assert text in found.texts, text
    start = page.index("User 12 met author 7")
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", page[start : page.index("User 13 met author 7")])
    assert cells[:5] == [
        *("live (20)", "41 % (8.2 ×)", "2.0 days ago", "live 70 of author 7 (same author, author_category)"),
        "click, gift",
    ]
    assert len(cells) == 4 * 5, "a line for each stored visit"


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (None, "The run has kept no examples of its attention (an earlier version wrote it)"),
        ("{", "attention_examples.json: not valid JSON"),
        ('{"examples": [{"probabilities": {"click": %s}}]}' % ("9" * 400), "attention_examples.json: not valid JSON"),
        ('{"examples": 3}', ""),
        ('{"examples": [3, {"histories": {"live": {"found": "x", "entries": [1]}, "short": []}}]}', ""),
        ('{"examples": [{"histories": {"<img>": {"found": 1, "entries": [{"attention": 1}]}}}]}', ""),
    ],
)
def test_examples_of_attention_that_are_missing_or_damaged_leave_a_page(
    run: Path, few_draws: None, content: str | None, note: str
) -> None:
    file = run / "attention_examples.json"
    file.unlink()
    if content is not None:
        file.write_text(content)
    page = make_report(run)
    assert note in " ".join(PageElements(page).texts)
    assert ("an unknown time ago" in page) == ('[{"hist' in (content or "")), "what is there is shown"
    assert "<img" not in page


def test_a_baseline_that_is_better_beyond_chance_is_a_warning(run: Path, tmp_path: Path) -> None:
    assert "The baseline" not in make_report(run)
    # The same rows by a better and by an equally good model.
    for noise, warned in ((0.02, True), (0.1, False)):
        shutil.rmtree(run / "baselines")
        write_model(run / "baselines" / "logistic", "logistic", noise)
        document = json.loads((run / "baselines/logistic/metrics.json").read_text())
        document["behaviours"]["click"]["auc"] = 0.99
        (run / "baselines/logistic/metrics.json").write_text(json.dumps(document))
        assert ("The baseline logistic has a higher AUC of click: 0.9900" in make_report(run)) == warned


def test_every_chart_has_its_data_and_a_text(page: str) -> None:
    found = PageElements(page)
    charts = [attributes for attributes in found.of("svg") if attributes.get("role") == "img"]
    figures = page.split("<figure>")[1:]
    assert len(charts) == len(figures) == 11
    for attributes, figure in zip(charts, figures, strict=True):
        assert ":" in str(attributes["aria-label"])
        assert figure.partition("</figure>")[0].count("<tr>") >= 2 and "<details>" in figure
    hidden = [attributes for attributes in found.of("svg") if attributes not in charts]
    assert all(attributes.get("aria-hidden") == "true" for attributes in hidden)


def test_the_page_loads_nothing_and_runs_nothing(page: str) -> None:
    found = PageElements(page)
    assert {tag for tag, _ in found.elements}.isdisjoint(("script", "img", "link", "iframe", "object", "base", "a"))
    assert not re.search(r"https?:|url\(|@import|srcset|javascript:", page)
    assert not [
        name for _, attributes in found.elements for name in attributes if name.startswith("on") or name == "src"
    ]
    (policy,) = [meta["content"] for meta in found.of("meta") if meta.get("http-equiv")]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_texts_of_a_run_are_no_markup(tmp_path: Path, few_draws: None) -> None:
    behaviour = EVIL.replace("/", "")
    run = write_ranker(tmp_path / "<b>bold", name=EVIL, behaviours=(behaviour,))
    plan = json.loads((run / "plan.json").read_text())
    (run / "plan.json").write_text(json.dumps([plan[0] | {"table": EVIL, "sharding": EVIL}]))
    config = json.loads((run / "config.json").read_text()) | {EVIL: {EVIL: EVIL}}
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError), recorded_status(run, EVIL, 0, 1):
        raise UserError(EVIL)
    page = make_report(run)
    assert "<img" not in page and "<b>bold" not in page and "<script" not in page
    assert any(EVIL in text for text in PageElements(page).texts)
    assert PageElements(page).of("svg")[0]["aria-label"] is not None


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


FILES = (
    *("metrics.json", "config.json", "environment.json", "plan.json", "held_out.parquet", "checkpoints"),
    *("checkpoints/step-00000020/job.json", "baselines/logistic/metrics.json", "baselines"),
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", [remove, lambda path: path.is_file() and path.write_text("{")], ids=["gone", "cut"])
def test_a_run_that_is_not_whole_has_a_page(
    run: Path, few_draws: None, name: str, harm: Callable[[Path], object]
) -> None:
    (run / "lock").touch()
    harm(run / name)
    page = make_report(run)
    assert "Where it ran" in page or "environment.json" in name
    if harm is not remove and name != "environment.json" and (run / name).is_file():
        assert Path(name).name in page, "what is damaged is named"
        assert "is not there" not in page and "has kept no predictions" not in page, "and is not said to be missing"
    if harm is remove and name == "metrics.json":
        assert "metrics.json is not there: the run has not finished." in page


@pytest.mark.parametrize("value", [None, 1, "a", [], {}, [1], [{}], {"a": 1}, {"a": {"b": "c"}}, {"a": [[1, 2, 3]]}])
def test_values_of_other_types_are_left_out(run: Path, few_draws: None, value: Any) -> None:
    remove(run / "baselines")
    keys = ("behaviours", "training", "calibration_curves", "stream")
    (run / "metrics.json").write_text(json.dumps(dict.fromkeys(keys, value)))
    for name, content in (("plan.json", value), ("checkpoints/step-00000020/job.json", {"trace": value})):
        (run / name).write_text(json.dumps(content))
    assert "<h1>" in make_report(run)
    (run / "checkpoints/step-00000020/job.json").write_text(
        json.dumps({"trace": [{"step": 1, "auc": value, "ids": value}]})
    )
    assert "<h1>" in make_report(run)


@pytest.mark.parametrize(
    ("config", "metrics", "expected"),
    [
        (
            {"lora": {}},
            {"evaluation": {"task": {"model": {"accuracy": 0.5}}}},
            ("task", "tuned", "0.5000", "Loss of an answer token, in nats"),
        ),
        ({"towers": {}}, {"retrieval": {"all": {"mrr": 0.1}}}, ("MRR", "0.1000", "Throughput")),
        ({"lcu": {}}, {"all": {"rmse": 8.6}}, ("RMSE (s)", "8.6000")),
        (
            {"evaluate": {}},
            {"evaluation": {"quality": {"all": {"model": {"top_1": 0.2}}}}},
            ("model", "0.2000", "Loss of a row, in nats (sampled codes)"),
        ),
    ],
)
def test_runs_of_other_kinds_have_a_page(run: Path, config: Any, metrics: Any, expected: str) -> None:
    remove(run / "held_out.parquet")
    (run / "config.json").write_text(json.dumps(config))
    (run / "metrics.json").write_text(json.dumps(metrics))
    texts = PageElements(make_report(run)).texts
    assert set(expected) <= set(texts)


def test_a_run_without_rows_says_so(run: Path, few_draws: None) -> None:
    document = json.loads((run / "metrics.json").read_text())
    document["training"] |= {"rows": 0, "skipped_rows": 0}
    (run / "metrics.json").write_text(json.dumps(document))
    text = " ".join(" ".join(PageElements(make_report(run)).texts).split())
    assert "The model was trained on 0 rows." in text and "rows trained on 0 " in text


def test_a_metric_or_a_truth_that_is_not_known_is_said(run: Path, few_draws: None) -> None:
    document = json.loads((run / "metrics.json").read_text())
    document["behaviours"]["gift"] |= {"auc": None, "gauc": None, "positives": 0}
    (run / "metrics.json").write_text(json.dumps(document))
    page = make_report(run)
    assert "gift has 0 positives in the held-out range: its metrics are mostly chance." in page
    assert "which this simulated world knows" in page
    for file in (run / "metrics.json", run / "baselines/logistic/metrics.json"):
        document = json.loads(file.read_text())
        for values in document["behaviours"].values():
            del values["best_auc"]
        file.write_text(json.dumps(document))
    page = make_report(run)
    assert "so the best possible AUC is not known either" in page and "best possible</li>" not in page


def test_a_stream_has_its_counts(run: Path, few_draws: None) -> None:
    document = json.loads((run / "metrics.json").read_text())
    document["stream"] = {"counts": {"late_events": 1234}, "freshness_seconds": {"p50": 2.5}, "progressive": {}}
    (run / "metrics.json").write_text(json.dumps(document))
    texts = PageElements(make_report(run)).texts
    assert "late events" in texts and "1,234" in texts and "2.5000" in texts


def test_a_running_job_has_a_page(run: Path, few_draws: None, monkeypatch: pytest.MonkeyPatch) -> None:
    remove(run / "metrics.json")
    monkeypatch.setattr(runs, "is_locked", lambda directory: True)
    page = make_report(run)
    assert "running" in page and "curves reach to the newest checkpoint" in page and "Progressive AUC" in page


def test_the_report_is_made_at_the_end_of_a_job_and_once(
    run: Path, few_draws: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_last_report(run)
    (run / "report.html").write_text("kept")
    later = (run / "metrics.json").stat().st_mtime + 10
    os.utime(run / "report.html", (later, later))
    write_last_report(run)
    assert (run / "report.html").read_text() == "kept"
    os.utime(run / "baselines/logistic/metrics.json", (later + 10, later + 10))
    write_last_report(run)
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    (run / "report.html").unlink()
    monkeypatch.setattr(run_report, "make_report", lambda *arguments, **options: 1 / 0)
    with caplog.at_level(logging.WARNING):
        write_last_report(run)
    assert "report.html: not written (ZeroDivisionError" in caplog.text and not (run / "report.html").exists()


def test_further_runs_stand_beside_the_first_one(run: Path, tmp_path: Path) -> None:
    other = write_ranker(tmp_path / "worse", 0.5, dropout=0.5)
    page = make_report(run, [other])
    texts = PageElements(page).texts
    assert "Side by side" in texts and "On the 1,200 held-out rows that every run has kept" in page
    assert f"{other} − {run}" in texts and re.search(r"<td>-0\.\d{4} \(-0\.\d{4}, -0\.\d{4}\)</td>", page)
    assert "model.dropout" in texts and texts.count(str(other)) >= 4, "in tables and legends"
    shutil.rmtree(other / "checkpoints")
    (other / "metrics.json").unlink()
    (other / "held_out.parquet").unlink()
    assert "has kept no predictions" in make_report(run, [other])


def test_a_run_is_compared_with_another_one(run: Path, tmp_path: Path) -> None:
    other = write_ranker(tmp_path / "worse", 0.5, name="other", dropout=0.5)
    page = make_report(run, against=other)
    texts = PageElements(page).texts
    assert f"{run} − {other}" in texts and f"{other} − {run}" not in texts
    assert re.search(r"<td>0\.\d{4} \(0\.\d{4}, 0\.\d{4}\)</td>", page), "the run is better than the other one"
    (marked,) = re.findall(r'<mark class="other">(.*?)</mark>', page)
    assert marked == "dropout = 0.0  # other run: 0.5" and f"1 key differs from {other}; a comment" in page
    (other / "config.json").unlink()
    assert "The job file is not compared: " in make_report(run, against=other)
    with pytest.raises(UserError, match="no run here"):
        make_report(run, against=tmp_path)


def test_a_baseline_of_a_run_can_be_compared_with(run: Path, few_draws: None) -> None:
    page = make_report(run, against=run / "baselines/logistic")
    assert re.findall(r'<mark class="other">(.*?)</mark>', page) == [
        "kind = &#34;mmoe&#34;  # default: &#34;ple&#34;, other run: &#34;logistic&#34;"
    ]


def test_a_watched_run_has_a_page_until_it_ends(run: Path, few_draws: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_report, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(run_report, "WATCH_SECONDS", 0.1)
    locking = "import sys; from pathlib import Path; from trainer.runtime.run_lock import locked\n"
    locking += "with locked(Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()"
    job = subprocess.Popen(
        [sys.executable, "-c", locking, str(run)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    page = run / "report.html"

    def shows(words: str) -> bool:
        return page.exists() and words in page.read_text()

    try:
        assert job.stdout is not None and job.stdout.readline() == b"locked\n"
        with ThreadPoolExecutor(1) as thread:
            watch = thread.submit(run_report.watch_report, run)
            assert wait_until(lambda: shows('http-equiv="refresh"') or watch.done()) and not watch.done()
            start = json.loads((run / "environment.json").read_text())
            start["starts"][0]["host"] = "the page follows the run"
            (run / "environment.json").write_text(json.dumps(start))
            assert wait_until(lambda: shows("the page follows the run") or watch.done()) and not watch.done()
            job.communicate()
            watch.result()
    finally:
        job.kill()
        job.communicate()
    assert shows("the page follows the run") and not shows('http-equiv="refresh"')


@pytest.mark.parametrize("signal", [KeyboardInterrupt, Terminated])
def test_a_signal_ends_a_watch_with_a_page_that_does_not_load_itself(
    signal: type[BaseException], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: list[str] = []

    def interrupted(seconds: float) -> None:
        pages.append((run / "report.html").read_text())
        raise signal

    monkeypatch.setattr(run_report, "make_report", lambda *runs: "<head>\n")
    monkeypatch.setattr(run_report, "is_locked", lambda directory: True)
    monkeypatch.setattr(run_report.time, "sleep", interrupted)
    with pytest.raises(signal):
        run_report.watch_report(run)
    pages.append((run / "report.html").read_text())
    assert ['http-equiv="refresh" content="30"' in page for page in pages] == [True, False]


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_job_that_removes_its_directory_ends_a_watch_with_the_page_before(
    elsewhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "first.fit"
    directory.mkdir()
    (directory / "status.json").write_text("{}")
    monkeypatch.setattr(run_report, "is_locked", lambda directory: directory.exists())
    monkeypatch.setattr(run_report.time, "sleep", lambda seconds: shutil.rmtree(directory))
    out = tmp_path / "page.html"
    run_report.watch_report(directory, Output.of(out) if elsewhere else None)
    assert list(tmp_path.iterdir()) == ([out] if elsewhere else [])
    assert not elsewhere or ("first.fit" in out.read_text() and 'http-equiv="refresh"' not in out.read_text())
    assert "no such directory" in caplog.text
    with pytest.raises(UserError, match="no run here"):
        run_report.watch_report(directory, Output.of(out))


def wait_until(holds: Callable[[], bool]) -> bool:
    """Wait for a minute at most until something holds; True if it does."""
    until = time.monotonic() + 60
    while not holds() and time.monotonic() < until:
        time.sleep(0.02)
    return holds()


def test_a_page_goes_where_it_is_asked_for(run: Path, few_draws: None, tmp_path: Path) -> None:
    write_report(run, Output.of(tmp_path / "page.html"))
    assert (tmp_path / "page.html").read_text() == make_report(run) and not (run / "report.html").exists()
    with pytest.raises(UserError, match="no run here"):
        write_report(tmp_path)
