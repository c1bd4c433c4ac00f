"""Shared parts of the benchmarks: intervals, result files, ranks in processes of their own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks import measure


def test_intervals_are_students() -> None:
    values = [0.71, 0.74, 0.72, 0.75]
    mean, half = measure.mean_and_half_width(values)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert (mean, half) == (pytest.approx(np.mean(values)), pytest.approx((high - low) / 2))


def test_one_seed_has_no_interval_and_undefined_stays_undefined() -> None:
    assert measure.mean_and_half_width([2.0]) == [2.0, None]
    assert measure.mean_and_half_width([2.0, None]) == [None, None]
    assert measure.mean_and_half_width([2.0, float("nan")]) == [None, None]
    assert measure.mean_and_half_width([]) == [None, None]


def test_a_result_has_its_environment_and_no_file_means_none(tmp_path: Path) -> None:
    out = tmp_path / "new" / "result.json"
    measure.write_result(out, {"figure": 1}, ranks=3)
    written = json.loads(out.read_text())
    assert written["figure"] == 1 and written["environment"]["ranks"] == 3 and written["environment"]["cores"] > 0
    assert {"commit", "load_before", "load_after", "cores_of_others"} <= written["environment"].keys()
    measure.write_result(None, {"figure": 1})


def test_cores_of_others_are_what_the_run_s_own_processes_did_not_use() -> None:
    before, after = measure.MachineLoad(0.5, 10, 100, 2), measure.MachineLoad(3.25, 14, 109, 8)
    expected = {"load_before": 0.5, "load_after": 3.25, "cores_of_others": 0.75}
    assert measure.load_facts(before, after) == expected
    busy_machine = measure.MachineLoad.now()
    sum(range(2_000_000))
    later = measure.MachineLoad.now()
    assert later.own > busy_machine.own and later.busy >= busy_machine.busy and later.seconds > busy_machine.seconds


def test_a_commit_says_whether_files_differ_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.setattr(measure, "ROOT", tmp_path)
    assert measure.commit() is None
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "first")
    assert measure.commit() == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("2")
    assert measure.commit() == git("rev-parse", "HEAD") + "+changes"


def test_the_spread_of_runs() -> None:
    assert measure.median_and_range([5, 1, 3, 2]) == {"median": 2.5, "least": 1, "most": 5}
    runs = [{"a": 5.0, "b": 1.0}, {"a": 1.0, "b": 1.0}]
    assert measure.spread_of(runs) == {
        "a": {"median": 3.0, "least": 1.0, "most": 5.0},
        "b": {"median": 1.0, "least": 1.0, "most": 1.0},
    }


def test_the_median_of_runs_keeps_names_and_sizes_and_the_runs() -> None:
    runs = [
        {"by": "1 x row_wise", "bytes": 20, "save": {"seconds": seconds, "peak": 7}, "ok": True, "none": None}
        for seconds in (3.0, 1.0, 2.0)
    ]
    found = measure.median_of(runs)
    assert found == {**runs[0], "save": {"seconds": 2.0, "peak": 7}, "runs": runs}
    assert isinstance(found["bytes"], int)


def test_every_benchmark_has_out(capsys: pytest.CaptureFixture[str]) -> None:
    parser = measure.make_parser("speed.nothing", "Measure nothing.\n\n    a line as it stands")
    assert parser.parse_args(["--out=a.json"]).out == Path("a.json") and parser.parse_args([]).out is None
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    printed = capsys.readouterr().out
    assert "python -m benchmarks.speed.nothing" in printed and "\n    a line as it stands\n" in printed


@pytest.mark.parametrize("cpu_only", [True, False])
def test_ranks_are_started_with_threads_and_write_a_file(monkeypatch: pytest.MonkeyPatch, cpu_only: bool) -> None:
    def run(command: list[str], check: bool, env: dict[str, str]) -> None:
        assert check and command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        assert command[5:-1] == ["-m", "benchmarks.some", "--one", "3"]
        assert env["OMP_NUM_THREADS"] == "4" and env["CUDA_VISIBLE_DEVICES"] == ("" if cpu_only else "7")
        Path(command[-1]).write_text('{"figure": 5}')

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setattr(subprocess, "run", run)
    found: dict[str, Any] = measure.run_ranks("benchmarks.some", ["--one", 3], ranks=2, threads=4, cpu_only=cpu_only)
    assert found == {"figure": 5}


def test_best_and_fastest() -> None:
    assert measure.best_of([{"a": 1, "b": 5}, {"a": 2, "b": 4}]) == {"a": 2, "b": 5}
    ticks = iter([0.0, 5.0, 10.0, 12.0])
    assert measure.fastest(lambda: None, 2, lambda: next(ticks)) == 2
    before = measure.busy_seconds(torch.device("cpu"))
    assert measure.busy_seconds(torch.device("cpu")) >= before
