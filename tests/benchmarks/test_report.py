"""The generated documents are fresh, follow the measured figures, and name every result file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from benchmarks.report import pages
from benchmarks.report.__main__ import RESULTS, documents, main, stale
from benchmarks.report.pages import BEGIN, END, readme_table, results_page, tidy, with_readme_table
from benchmarks.report.rendering import interval, span, with_spread
from benchmarks.report.results import read_results, read_stream_kills
from tests.paths import ROOT


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A copy of the measured results, without pictures."""
    copy = tmp_path / "results"
    copy.mkdir()
    for file in [*RESULTS.glob("*.json"), *RESULTS.glob("*.log")]:
        shutil.copy(file, copy)
    return copy


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A directory with a README.md that has a place for the table, and nothing else."""
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "README.md").write_text(f"# Title\n\n{BEGIN}\n{END}\n\nThe end.\n")
    return root


def test_no_document_is_stale() -> None:
    old = stale(ROOT, documents(ROOT, RESULTS))
    assert not old, f"stale: {', '.join(old)}; run python -m benchmarks.report"


def test_every_result_file_is_linked_from_the_page() -> None:
    page = (ROOT / "docs" / "results.md").read_text()
    missing = [file.name for file in RESULTS.iterdir() if f"(../benchmarks/results/{file.name})" not in page]
    assert not missing


def test_a_changed_figure_changes_page_and_table(results: Path) -> None:
    file = results / "kuairand.json"
    content = json.loads(file.read_text())
    figure = content["result"]["click"]["auc"]["ple"]
    before = f"{figure['mean']:.4f}"
    figure["mean"] = 0.98765
    page, table = results_page(results), readme_table(results)
    assert f"| click | 13,476 | {before} /" in page and f"click AUC {before}" in table
    file.write_text(json.dumps(content))
    page, table = results_page(results), readme_table(results)
    assert "| click | 13,476 | 0.9877 /" in page and "click AUC 0.9877" in table
    assert f"| click | 13,476 | {before} /" not in page and before not in table


def test_a_benchmark_without_a_result_is_named(results: Path) -> None:
    (results / "roofline.json").unlink(missing_ok=True)
    page = results_page(results)
    named = page[page.index("These benchmarks have no result here:") :]
    assert "`speed.roofline`" in named and "`speed.loader`" not in named and "## Roofline" not in page


def test_a_result_without_a_record_of_the_load_is_named(results: Path) -> None:
    file = results / "roofline.json"
    content = json.loads(file.read_text())
    named = results_page(results).partition("## Results without a record of the load")[2]
    assert "`checkpoint`" in named and "`roofline`" not in named
    del content["environment"]["load_before"]
    file.write_text(json.dumps(content))
    named = results_page(results).partition("## Results without a record of the load")[2]
    assert "`roofline`" in named


def test_a_figure_that_no_result_has_is_an_error(results: Path) -> None:
    file = results / "loader.json"
    content = json.loads(file.read_text())
    del content["shares"]
    file.write_text(json.dumps(content))
    with pytest.raises(UndefinedError, match="shares"):
        results_page(results)


def test_check_names_what_is_stale(checkout: Path, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--root", str(checkout), "--results", str(results)]
    with pytest.raises(SystemExit, match=r"stale: docs/results.md, docs/config.md, README.md; run"):
        main([*options, "--check"])
    assert not (checkout / "docs").exists(), "a check writes nothing"
    main(options)
    assert capsys.readouterr().out.split() == [
        word for name in ("docs/results.md", "docs/config.md", "README.md") for word in ("written:", name)
    ]
    main([*options, "--check"])
    readme = (checkout / "README.md").read_text()
    assert readme.startswith("# Title\n") and readme.endswith("The end.\n") and "| question | result |" in readme
    (checkout / "docs" / "config.md").write_text("by hand")
    with pytest.raises(SystemExit, match=r"stale: docs/config.md; run"):
        main([*options, "--check"])


def test_a_readme_without_a_place_is_refused(checkout: Path, results: Path) -> None:
    (checkout / "README.md").write_text(f"{END}\n{BEGIN}\n")
    with pytest.raises(SystemExit, match=r"README.md needs the lines"):
        main(["--root", str(checkout), "--results", str(results)])
    with pytest.raises(ValueError, match="each once"):
        with_readme_table(f"{BEGIN}\n{END}\n{END}\n", "table")


def test_the_config_page_has_every_key_of_every_job() -> None:
    page = pages.config_page()
    for command, (_, _, example) in pages.JOBS.items():
        assert f"## limelight {command}\n" in page and (ROOT / example).is_file()
    for key in ("`train.deepspeed`", "`learning_rate`", "`history.NAME.search`", "`pooling`", "`answer_weight`"):
        assert key in page


def test_keys_of_older_results_are_read_by_their_names_of_today(results: Path) -> None:
    found = read_results(results)
    assert found["dedup"]["results"][0]["unique_ids"] > 0
    assert found["finetune"]["environment"]["cores"] == found["finetune"]["cores"]


def test_the_log_of_the_stream_s_kills_is_read() -> None:
    log = (
        "files: undisturbed, 1,234 events, 5 steps, 9 s\nkill 1 of 2: behind step 2 of 5\n2 kills: equal\n"
        "2 ranks to 1 in the middle: 7 rows of 6 requests, each once\n\n"
        "kafka: undisturbed, 1,234 events, 5 steps, 9 s\n3 kills: equal but for\n  one\n"
        "2 ranks to 1 in the middle: 8 rows of 6 requests, each once\n"
    )
    found = read_stream_kills(log)
    assert found["files"] == {"events": 1234, "steps": 5, "kills": 2, "rows": 7, "requests": 6, "outcome": "equal"}
    assert found["kafka"]["outcome"] == "equal but for one"
    with pytest.raises(ValueError, match=r"stream_kills\.log has no outcome"):
        read_stream_kills(log.partition("kafka")[0])


def test_numbers_as_text() -> None:
    assert interval({"mean": 0.65116, "half_width_95": 0.00799}, 3) == "0.651 ±0.008"
    assert interval([0.0107, 0.0053], 4, "+") == "+0.0107 ±0.0053"
    assert interval([2.0, None], 1) == "2.0" and interval([None, None], 1) == "-"
    assert span([0.27, 0.45, 0.3], 0, "percent") == "27 to 45 %"
    assert span([0.271, 0.269], 0, "percent") == "27 %"
    assert span([-2.0, 1.0], 1, "signed") == "-2.0 to +1.0"
    runs = [{"load": {"seconds": seconds}} for seconds in (3.0, 1.0, 2.0)]
    assert with_spread({"load": {"seconds": 2.0}, "runs": runs}, 1, "load", "seconds") == "2.0 (1.0 to 3.0)"
    assert with_spread({"load": {"seconds": 2.0}}, 1, "load", "seconds") == "2.0"


def test_prose_is_filled_and_tables_are_not() -> None:
    words = "word " * 40
    page = tidy(f"# Title\n\n{words}\nmore\n\n\n\n| {words} |\n\n* {words}\n  rest\n* two\n")
    lines = page.splitlines()
    assert max(len(line) for line in lines if not line.startswith("|")) <= 120
    assert f"| {words} |" in lines and "* two" in lines and "\n\n\n" not in page
