"""`limelight bench`: the benchmarks of a checkout are found without an import, chosen by name, and run to the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launch import benchmark_runs, python_path
from launch.benchmark_runs import find_benchmarks, run_benchmarks, select_benchmarks
from launch.cli.main import main
from tests.paths import ROOT
from trainer.console.errors import UserError

BENCHMARK = '''"""Measure {name}.

More.
"""
import json, os, sys
{short}
def main():
    print("measured", sys.argv[1:])
    if "--out" in sys.argv:
        open(sys.argv[-1], "w").write(json.dumps(sys.argv[1:]))
    sys.exit({status})
main()
'''


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with three benchmarks, one of which fails, and a module without a ``main``."""
    directory = tmp_path / "checkout" / "benchmarks"
    for folder in ("speed", "moment", "report"):
        (directory / folder).mkdir(parents=True)
        (directory / folder / "__init__.py").write_text("")
    (directory / "__init__.py").write_text("")
    (directory / "measure.py").write_text("")
    (directory / "speed" / "part.py").write_text("raise AssertionError\n")
    files = {
        "speed/first": ('SHORT = ("--rows", "5")', 0),
        "speed/broken": ("SHORT = ()", 3),
        "moment/__main__": ("", 0),
        "report/__main__": ("", 0),
    }
    for file, (short, status) in files.items():
        (directory / f"{file}.py").write_text(BENCHMARK.format(name=file, short=short, status=status))
    monkeypatch.setattr(python_path, "ROOT", tmp_path / "checkout")
    return tmp_path


def test_benchmarks_are_found_with_question_and_short_arguments(checkout: Path) -> None:
    found = {it.name: it for it in find_benchmarks()}
    assert list(found) == ["moment", "speed.broken", "speed.first"]
    assert found["speed.first"].question == "Measure speed/first" and found["speed.first"].result == "first.json"
    assert found["speed.first"].short == ("--rows", "5") and found["moment"].short is None


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["speed.first"], ["speed.first"]),
        (["first", "speed.first"], ["speed.first"]),
        (["speed"], ["speed.broken", "speed.first"]),
        (["moment", "all"], ["moment", "speed.broken", "speed.first"]),
    ],
    ids=" ".join,
)
def test_a_name_is_a_benchmark_a_folder_or_all(checkout: Path, names: list[str], chosen: list[str]) -> None:
    assert [it.name for it in select_benchmarks(names, find_benchmarks())] == chosen


def test_the_short_set_runs_without_names_and_a_failure_stops_nothing(
    checkout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--json", str(checkout / "new" / "out")]) == 1
    assert json.loads((checkout / "new/out/first.json").read_text())[:2] == ["--rows", "5"]
    printed = capfd.readouterr()
    assert "2/2 speed.first --rows 5" in printed.out and "failed with status 3" in printed.out
    assert printed.err == "limelight: error: failed: speed.broken\n"


def test_options_go_to_the_one_benchmark(checkout: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "first", "--options", "--rows '1 2'"]) == 0
    assert "measured ['--rows', '1 2']" in capfd.readouterr().out
    assert main(["bench", "first", "--short", "--options", "--more"]) == 0
    assert "measured ['--rows', '5', '--more']" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frist"], "no benchmark 'frist'; there are moment, speed.broken, speed.first"),
        (["speed", "--options", "-x"], "--options '-x': options are for one benchmark, and 2 are chosen"),
        (["first", "--options", "'x"], '--options "\'x": no closing quotation'),
        (["moment", "--short"], "moment: not in the short set; leave out --short for a run of full size"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line(
    checkout: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    assert capsys.readouterr().err == f"limelight: error: {message}\n"


def test_a_wheel_says_that_it_has_no_benchmarks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(python_path, "ROOT", tmp_path)
    assert main(["bench"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("no benchmarks here, since a wheel has none; run this command in a checkout")


def test_an_interrupted_run_ends_the_benchmark_and_what_it_started(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []

    class Interrupted(subprocess.Popen):  # type: ignore[type-arg]
        def wait(self, timeout: float | None = None) -> int:
            if not started:
                started.append(self)
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(benchmark_runs.subprocess, "Popen", Interrupted)
    (checkout / "checkout/benchmarks/speed/first.py").write_text('"""Wait."""\nimport time\ntime.sleep(600)\n')
    first = benchmark_runs.BenchmarkFile("speed.first", "", ())
    with pytest.raises(KeyboardInterrupt):
        run_benchmarks([first], None, short=False)
    assert started[0].returncode == -signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.killpg(started[0].pid, 0)


def test_this_checkout_has_a_short_set_whose_options_exist() -> None:
    short = [it for it in find_benchmarks() if it.short is not None]
    assert len(short) >= 10
    for benchmark in short:
        source = (ROOT / "benchmarks" / f"{benchmark.name.replace('.', '/')}.py").read_text()
        options = [word for word in benchmark.short or () if word.startswith("--")]
        assert [option for option in options if f'"{option}"' not in source.partition("def main(")[2]] == []


def test_the_list_marks_the_short_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    printed = capsys.readouterr().out
    assert "speed.loader *" in printed and "quality.cross  " in printed
    with pytest.raises(UserError, match="no benchmark 'x'"):
        select_benchmarks(["x"], find_benchmarks())
