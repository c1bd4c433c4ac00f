"""The script for a GPU: its steps run on a CPU at a size of seconds, and no failure of one step ends the others."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.speed import gpu, gpu_network_steps, gpu_steps, gpu_stream_steps
from benchmarks.speed.gpu_steps import Missing, Step


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run steps in this process, which has imported torch."""

    def run_step(name: str, small: bool, seconds: float) -> dict[str, Any]:
        out = tmp_path / f"{name}.json"
        gpu.main(["--one", name, str(out), *(["--small"] if small else [])])
        return {"seconds": 0.0, **json.loads(out.read_text())}

    monkeypatch.setattr(gpu, "run_step", run_step)


def test_steps_that_take_any_device_measure_something(
    in_this_process: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.speed import finetune

    monkeypatch.setattr(finetune, "measure", lambda cell, shape: {"tokens_per_second": 1.0})
    out = tmp_path / "gpu.json"
    gpu.main(["--small", f"--out={out}", "--steps", "snapshot", "language_model", "ranker"])
    steps = json.loads(out.read_text())["steps"]
    assert [set(step) for step in steps.values()] == [{"seconds", "result"}] * 3
    assert steps["snapshot"]["result"]["pinned"]["seconds"] > 0
    assert "ours, 4 x 64, packed" in steps["language_model"]["result"]
    ranker = steps["ranker"]["result"]
    assert len(ranker) == 2 and all(figures["launches"] > 50 for figures in ranker.values())
    assert "[1/3] snapshot" in capsys.readouterr().out


def test_the_device_gives_the_rows_of_the_cpu_map_to_ids() -> None:
    found: dict[str, Any] = {}
    for part in gpu_steps.dynamic_ids(small=True):
        found |= part
    assert [policy["values_that_differ"] for policy in found.values()] == [0, 0, 0]


@pytest.mark.slow
def test_the_device_finds_the_entries_of_the_loaders_searches() -> None:
    found: dict[str, Any] = {}
    for part in gpu_steps.device_searches(small=True):
        found |= part
    assert found["visits"] > 1000 and found["batches"] == 4 and found["ids_that_differ"] == 0


@pytest.mark.slow
def test_the_device_finds_the_entries_of_histories_that_grow() -> None:
    found: dict[str, Any] = {}
    for part in gpu_stream_steps.stream_searches(small=True):
        found |= part
    assert found["visits at last"] > found["visits at first"] > 1000
    assert found["batches"] == 4 and found["ids_that_differ"] == 0


def test_attention_of_packed_samples_is_the_same_by_a_dense_mask_and_by_blocks() -> None:
    found: dict[str, Any] = {}
    for part in gpu_network_steps.packed_attention(small=True):
        found |= part
    assert found["attention, dense mask"]["largest_difference"] == 0
    assert set(found) == {"attention, dense mask", "attention, variable lengths", "attention, blocks"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("name", ["tests", "search"])
def test_a_step_that_needs_a_gpu_says_so(name: str, in_this_process: None, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    gpu.main(["--small", f"--out={out}", "--steps", name])
    assert json.loads(out.read_text())["steps"][name]["missing"] == "no CUDA device is here"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["process_group", "zero", "compile", "language_model", "job", "dynamic_job", "searched_job", "searched_stream"],
)
def test_a_step_in_a_process_of_its_own(name: str, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    gpu.main(["--small", f"--out={out}", "--steps", name])
    step = json.loads(out.read_text())["steps"][name]
    assert set(step) == {"seconds", "result"}
    if name in ("job", "dynamic_job", "searched_job", "searched_stream"):
        # A GPU adds in another order, and gradients of one id in any order.
        tolerance = 1e-3 if torch.cuda.is_available() else 0
        assert step["result"]["largest_difference_to_cpu"] <= tolerance
        if name == "job":
            assert step["result"]["largest_difference_after_resume"] <= tolerance
    if name == "compile":
        differences = [value for key, value in step["result"].items() if key.startswith("largest difference")]
        assert len(differences) == 2 and max(differences) <= (2e-2 if torch.cuda.is_available() else 1e-6)
    if name == "zero":
        for figures in step["result"].values():
            assert figures["last_loss"] < figures["first_loss"]


def parts(*, failure: Exception | None = None) -> Callable[[bool], Iterator[dict[str, Any]]]:
    def run(small: bool) -> Iterator[dict[str, Any]]:
        yield {"first": 1.5}
        if failure is not None:
            raise failure
        yield {"second": {"rate": 2}}

    return run


def test_what_a_step_measured_before_it_lacked_something_is_kept(
    in_this_process: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = {
        "whole": Step(parts(), 1),
        "lacking": Step(parts(failure=Missing("no deepspeed is here")), 1),
        "without": Step(parts(failure=ModuleNotFoundError("No module named 'torchrec'")), 1),
    }
    monkeypatch.setattr(gpu, "STEPS", steps)
    out = tmp_path / "gpu.json"
    gpu.main([f"--out={out}", "--steps", *steps])
    document = json.loads(out.read_text())
    assert document["steps"] == {
        "whole": {"seconds": 0.0, "result": {"first": 1.5, "second": {"rate": 2}}},
        "lacking": {"seconds": 0.0, "missing": "no deepspeed is here", "result": {"first": 1.5}},
        "without": {"seconds": 0.0, "missing": "No module named 'torchrec'", "result": {"first": 1.5}},
    }
    assert "torch" in document["environment"]["packages"]
    assert "first 1.5, second (rate 2)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("program", "seconds", "expected"),
    [
        ("print('CUDA error: an illegal memory access'); raise SystemExit(1)", 600, "an illegal memory access"),
        ("import os; os.kill(os.getpid(), 9)", 600, ""),
        ("import time; print('waiting', flush=True); time.sleep(600)", 1, "ended after its limit of 1 s"),
    ],
)
def test_a_step_that_fails_or_hangs_says_why(
    program: str, seconds: float, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{program}"\n')
    script.chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(script))
    found = gpu.run_step("snapshot", small=True, seconds=seconds)
    assert expected in found["failed"] and "result" not in found


def test_a_failed_step_is_the_status_and_a_step_without_time_is_not_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu, "run_step", lambda name, small, seconds: {"seconds": 0.0, "failed": "no memory"})
    with pytest.raises(SystemExit, match="failed: snapshot, ranker"):
        gpu.main(["--steps", "snapshot", "ranker"])
    out, clock = tmp_path / "gpu.json", iter([0.0, 10.0, 61.0])
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(gpu, "run_step", lambda name, small, seconds: {"seconds": 1.0, "result": {"limit": seconds}})
    gpu.main(["--minutes=1", f"--out={out}", "--steps", "snapshot", "ranker"])
    steps = json.loads(out.read_text())["steps"]
    assert steps["snapshot"]["result"]["limit"] == 50.0
    assert steps["ranker"] == {"seconds": 0.0, "not_started": "no time was left"}
