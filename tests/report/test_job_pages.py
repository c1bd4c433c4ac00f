"""Pages about runs of the jobs that train no ranker: figures, warnings, files that are damaged or of another type."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.report.page_elements import PageElements
from tests.report.stored_runs import JOBS
from trainer.metrics.user_bootstrap import draw_users
from trainer.report.align_page import RankedPairs
from trainer.report.finetune_page import accuracy
from trainer.report.run_report import make_report
from trainer.report.user_means import DRAWS, UserMeans

EVIL = "</script><img src=x onerror=alert(1)>&"

EXPECTED = {
    "align": (
        # A random order finds 1 of 10 first.
        *("Retrieval", "random order, all", "0.1000", "0.3000", "Gate", "Throughput", "unseen", "held-out pairs"),
        "unseen: 5 held-out pairs: its metrics are mostly chance.",
    ),
    "codebook": (
        *("Held-out quality", "Use of the codes", "100x100-new", "60", "perplexity / codes, %", "Refresh", "90"),
        "Level 1: 40 % of the codes are not used by the held-out segments.",
        "Level 1: the most frequent 1 % of the codes hold 30 % of the segments.",
    ),
    "embeddings": (
        *("Tables of vectors", "items", "600", "qwen", "f00d", "empty texts"),
        "items: 90 of 600 embedded texts were cut.",
        "items: 60 texts are empty and have no vector.",
        "items: two vectors have a cosine of 1.000 on average, so they hardly tell the texts apart.",
    ),
    "finetune": (
        *("Held-out choices", "Accuracy of the choices", "trainable parameters", "1,000", "2.00 %", "512", "fire"),
        *("Loss of an answer token, in nats", "Tokens per second", "Learning rate", "tuned", "majority"),
        "a_task_with_a_long_name: the tuned model is not clearly better than majority: 0.4500, 0.4000.",
        "100 of 1,000 samples lost the beginning of their prompt: data.length is too short for them.",
    ),
    "follow": (
        *("Lag of the segments", "Segments per second", "segments embedded", "30", "9"),
        "9 segments are dropped.",
        "In 3 of 3 reports only every second segment was embedded.",
    ),
    "foresight": (
        *("Foreseen beside the rules", "Next code: top 10", "unseen authors: 25 rows", "knows style and topic"),
        *("known authors 75.0 %", "256-abc", "Loss of a row, in nats (sampled codes)"),
        "The rule last has a smaller NLL than the predictor: 2.5000, 3.0000 here.",
        "7 segments have no author and were left out.",
    ),
    "foresight follow": (
        *("Progressive top 1", "Progressive NLL (nats)", "forecast segments", "with fewer runs than data.runs"),
        "4 times the forecasts and steps of some ticks took longer than the ticks in event time.",
        "3 segments have no author and were left out.",
    ),
    "staytime": (
        *("Held-out metrics", "true expectation", "Mean stay against the mean prediction", "New and known videos"),
        *("Heads that rank comments", "Loss of the epochs", "duration edges", "not opened", "d2q", "dcn", "4,321"),
        "The mean prediction is 2.10 times the mean stay.",
        "The constant prediction (zero) has a smaller RMSE: 8.0000 s, 9.0000 s here.",
    ),
}
"""Texts of the page about each run of ``stored_runs``; sentences are warnings."""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("jobs")
    for kind, write in JOBS.items():
        write(root / kind)
    return root


@pytest.fixture(params=JOBS)
def run(request: pytest.FixtureRequest, stored: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stored / request.param, tmp_path / request.param))


def test_the_page_shows_what_the_job_is_for(run: Path) -> None:
    page = PageElements(make_report(run))
    for text in EXPECTED[run.name]:
        assert text in page.texts, text
    assert not [text for text in page.texts if "has not finished" in text or ": damaged" in text]
    charts = [attributes for attributes in page.of("svg") if attributes.get("role") == "img"]
    assert len(charts) == len(page.of("figure")) and all(":" in str(chart["aria-label"]) for chart in charts)


def files_of(run: Path) -> Iterator[Path]:
    yield from (file for file in sorted(run.rglob("*")) if file.is_file() and file.name != "lock")


def test_a_file_that_is_gone_or_cut_leaves_a_page(run: Path) -> None:
    for file in list(files_of(run)):
        content = file.read_bytes()
        for harm in (b"{", b"", None):
            if harm is None:
                file.unlink()
            else:
                file.write_bytes(harm)
            if (run / "codebook.json").exists() or (run / "lock").exists():
                assert "<h1>" in make_report(run), (file, harm)
        file.write_bytes(content)


VALUES: tuple[Any, ...] = (None, "a", [], {}, -1, [{"a": [1]}], {"all": {"a": {"b": None}}}, 1e300)


def test_values_of_other_types_are_left_out(run: Path) -> None:
    for file in files_of(run):
        if file.suffix != ".json" or file.name in ("status.json", "manifest.json"):
            continue
        content = json.loads(file.read_text())
        for place, key in enumerate(content):
            # Two values for each key: all pairs would take minutes.
            for value in (VALUES[place % len(VALUES)], VALUES[(place + 3) % len(VALUES)]):
                file.write_text(json.dumps(content | {key: value}))
                assert "<h1>" in make_report(run), (file, key, value)
        file.write_text(json.dumps(content))


def evil(value: Any) -> Any:
    """Return a JSON value with a name that could be markup in place of every text."""
    if isinstance(value, dict):
        return {EVIL + key if isinstance(inner, dict) else key: evil(inner) for key, inner in value.items()} | {
            key: evil(inner) for key, inner in value.items()
        }
    if isinstance(value, list):
        return [evil(inner) for inner in value]
    return EVIL if isinstance(value, str) else value


def test_texts_of_a_run_are_no_markup(run: Path) -> None:
    for file in files_of(run):
        if file.suffix == ".json" and file.name not in ("status.json", "manifest.json"):
            file.write_text(json.dumps(evil(json.loads(file.read_text()))))
    page = make_report(run)
    assert "<img" not in page and "<script" not in page


def test_lists_that_a_base_has_fitted_are_columns_of_one_table(stored: Path) -> None:
    page = make_report(stored / "staytime")
    table = page[page.index("<h3>Fitted by group</h3>") :].partition("</table>")[0]
    assert re.findall(r"<th[^>]*>([^<]*)</th>", table) == ["group", "duration edges", "not opened"]
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", table)
    # There are fewer edges than groups.
    assert cells == ["1", "10", "0.8000", "2", "20", "0.7000", "3", "", "0.6000"]
    values = page[page.index("<h3>Fitted on the training range</h3>") :].partition("</table>")[0]
    assert re.findall(r"<td[^>]*>([^<]*)</td>", values) == [
        *("limit", "99", "training visits", "777", "opened in training", "0.3000"),
    ]


def test_losses_of_metrics_json_stand_in_for_checkpoints_that_are_gone(stored: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(stored / "finetune", tmp_path / "run"))
    shutil.rmtree(run / "checkpoints")
    page = make_report(run)
    assert "Loss of an answer token" in page and "Tokens per second" not in page
    assert re.search(r"<td[^>]*>10</td>\s*<td[^>]*>2</td>", page), "the first record is of step 10"


def test_a_share_has_wilsons_interval() -> None:
    point = accuracy(0.5, 100)
    assert (
        point is not None
        and point.low == pytest.approx(0.4038, abs=1e-4)
        and point.high == pytest.approx(0.5962, abs=1e-4)
    )
    certain = accuracy(1.0, 10)
    assert certain is not None and certain.low == pytest.approx(0.7225, abs=1e-4) and certain.high == 1.0
    assert accuracy(None, 10) is None


def test_recall_counts_the_orders_of_equal_authors() -> None:
    pairs = RankedPairs(np.arange(3), *(np.array(values, float) for values in ([0, 1, 5], [1, 4, 1], [10, 10, 2])))
    assert pairs.recall(3).tolist() == [1.0, 0.5, 0.0]
    assert pairs.by_chance(3) == pytest.approx((0.3 + 0.3 + 1) / 3)


def test_a_mean_has_the_interval_of_its_users() -> None:
    random = np.random.default_rng(3)
    user, values, part = random.integers(0, 30, 400), random.random(400), random.random(400) < 0.2
    index, counts = draw_users(user, DRAWS, seed=1)
    draws = [np.average(values[part], weights=line[index[part]]) for line in counts.astype(float)]
    point = UserMeans(user).of(values, part)
    assert point is not None and point.value == pytest.approx(values[part].mean())
    assert (point.low, point.high) == pytest.approx(tuple(np.quantile(draws[1:], [0.025, 0.975])))
    assert UserMeans(user).of(values, np.zeros(400, bool)) is None
    alone = UserMeans(np.zeros(4, np.int64)).of(np.arange(4.0))
    assert alone is not None and alone.low == alone.high == 1.5 and math.isfinite(alone.value)
