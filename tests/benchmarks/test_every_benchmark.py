"""Every benchmark is run by a test, is listed in benchmarks/README.md, and has its own result file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"
FILES = sorted(file for file in BENCHMARKS.rglob("*.py") if re.search(r"^def main\(", file.read_text(), re.MULTILINE))
OTHER_RESULTS = {
    "instructions_calibrated",
    "chaos",
    "cross_content",
    "full_large",
    "larm_on_air",
    "moment_retraction",
    "mutants",
    "recipe_first",
    "recipe_small",
    "throughput_easyrec",
}
"""Results of `make chaos`, of `python -m tests.mutants`, and of other runs of LARM, of Cross, of all systems and of
recipes."""


def name_of(file: Path) -> str:
    """Name of a benchmark below ``benchmarks``, such as ``speed.loader`` or ``moment``."""
    return ".".join(file.relative_to(BENCHMARKS).with_suffix("").parts).removesuffix(".__main__")


def test_there_are_benchmarks() -> None:
    assert {"moment", "report", "speed.throughput", "quality.cross"} <= {name_of(file) for file in FILES}
    assert len(FILES) >= 19


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_test_calls_its_main(file: Path) -> None:
    tests = ROOT / "tests" / "benchmarks"
    if file.name == "__main__.py":
        candidates = [tests / file.parent.name / "test_main.py", tests / f"test_{file.parent.name}.py"]
    else:
        candidates = [tests / file.relative_to(BENCHMARKS).parent / f"test_{file.name}"]
    sources = [candidate.read_text() for candidate in candidates if candidate.exists()]
    assert any(re.search(r"\bmain\(\[?", source) for source in sources), f"no test calls main of {file}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_the_readme_lists_it(file: Path) -> None:
    text = (BENCHMARKS / "README.md").read_text()
    assert f"`{name_of(file)}`" in text or f"python -m benchmarks.{name_of(file)}" in text


def test_every_benchmark_of_speed_keeps_the_spread_of_its_runs() -> None:
    ways = {"median_and_range", "spread_of", "median_of", "times_by_turns"}
    # On a borrowed GPU each step runs once.
    files = [file for file in FILES if file.parent.name == "speed" and file.stem != "gpu"]
    without = [file.stem for file in files if not any(re.search(rf"\b{way}\(", file.read_text()) for way in ways)]
    assert len(files) > 15 and not without


def test_result_files_are_named_as_their_benchmark() -> None:
    names = {name_of(file).rpartition(".")[2] for file in FILES} | OTHER_RESULTS
    assert {file.stem for file in (BENCHMARKS / "results").glob("*.json")} <= names
