"""Directories of runs: choice, first start, resumption and refusal."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from modules import vector_code
from trainer.checkpoint.manifest import DatasetEntry
from trainer.checkpoint.run_directory import (
    COMPILED,
    begin_run,
    choose_directory,
    compiled_parts,
    load_run,
    run_directory,
    settled,
)
from trainer.config.deepspeed import is_enabled
from trainer.config.load import load_deepspeed
from trainer.config.ranker import JobConfig, parse_config
from trainer.config.sections import ResumeConfig
from trainer.console.errors import UserError, user_message
from trainer.runtime.checksums import write_checksums
from trainer.runtime.files import write_json
from trainer.runtime.run_lock import locked

CONFIG = parse_config({"data": {"path": "d"}, "run": {"name": "n"}}, "test")
DATA = DatasetEntry(path="d", fingerprint="abc")


def changed(**sections: dict[str, Any]) -> JobConfig:
    """Return ``CONFIG`` with changed keys."""
    raw = CONFIG.model_dump(mode="json")
    for name, keys in sections.items():
        raw[name] |= keys
    return parse_config(raw, "test")


def test_a_run_reads_back_and_resumes(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    with run_directory(run, job="train"):
        begin_run(run, CONFIG, world=2, dataset=DATA)
    begin_run(run, CONFIG, world=1, dataset=DATA)
    assert [start["ranks"] for start in json.loads((run / "environment.json").read_text())["starts"]] == [2, 1]
    loaded = load_run(run)
    assert loaded == changed(train={"deepspeed": str(run / "deepspeed.json")})
    assert load_deepspeed(loaded.train.deepspeed) == load_deepspeed(CONFIG.train.deepspeed)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_an_error_of_a_full_disk_names_the_directory(tmp_path: Path, number: int) -> None:
    run = tmp_path / "runs" / "one"
    with pytest.raises(OSError, match="runs/one") as raised, run_directory(run, job="train"):
        (run / "logs").mkdir()
        raise OSError(number, os.strerror(number))
    assert str(user_message(raised.value)).startswith(f"{run}: {os.strerror(number)}") and not run.exists()
    with pytest.raises(OSError, match="elsewhere"), run_directory(run, job="train"):
        (run / "config.json").touch()
        raise OSError(number, os.strerror(number), "elsewhere/file")
    assert (run / "config.json").exists(), "a begun run stays"
    with pytest.raises(OSError) as raised, run_directory(run, job="train"):
        raise OSError(errno.EIO, "a read failed")
    assert raised.value.filename is None, "it may be an input"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"batch_size": 64}}, "train.batch_size = 2048 then, 64 now"),
        ({"run": {"seed": 7}}, "run.seed = 1 then, 7 now"),
        ({"model": {"dropout": 0.5}, "train": {"epochs": 3}}, "model.dropout = 0.0 then, 0.5 now; train.epochs"),
        ({"train": {"weights": {"like": 2.0}}}, "train.weights.like = unset then, 2.0 now"),
        ({"resume": {"enabled": False}}, "a run is already here"),
    ],
)
def test_a_run_does_not_resume_with_other_settings(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    begin_run(tmp_path, CONFIG, world=1, dataset=DATA)
    with pytest.raises(UserError) as refused:
        begin_run(tmp_path, changed(**sections), world=1, dataset=DATA)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert load_run(tmp_path).train.batch_size == CONFIG.train.batch_size


def alone(device: str) -> Any:
    return SimpleNamespace(device=torch.device(device), on_first_rank=lambda read: read())


def test_a_run_keeps_its_precision_on_another_device(tmp_path: Path) -> None:
    for device, precision in (("cuda", "bf16"), ("cpu", "fp32")):
        directory = tmp_path / device
        began = settled(CONFIG, directory, alone(device))
        assert CONFIG.train.precision == "auto" and began.train.precision == precision
        directory.mkdir()
        begin_run(directory, began, world=1, dataset=DATA)
        assert is_enabled(load_deepspeed(load_run(directory).train.deepspeed).get("bf16")) == (precision == "bf16")
        for other in ("cuda", "cpu"):
            resumed = settled(CONFIG, directory, alone(other))
            assert resumed.train.precision == precision
            begin_run(directory, resumed, world=1, dataset=DATA)
        different = "fp32" if precision == "bf16" else "bf16"
        with pytest.raises(UserError, match=f'train.precision = "{precision}" then, "{different}" now'):
            begin_run(directory, changed(train={"precision": different}), world=1, dataset=DATA)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_run_of_a_version_without_the_key_keeps_the_precision_of_its_deepspeed_settings(
    tmp_path: Path, bf16: bool
) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(load_deepspeed(CONFIG.train.deepspeed) | ({"bf16": {"enabled": True}} if bf16 else {})))
    config = changed(train={"deepspeed": str(file)})
    run = tmp_path / "run"
    run.mkdir()
    begin_run(run, config, world=1, dataset=DATA)
    stored = json.loads((run / "config.json").read_text())
    del stored["train"]["precision"]
    (run / "config.json").write_text(json.dumps(stored))
    write_checksums(run, ("config.json", "deepspeed.json"))
    resumed = settled(config, run, alone("cuda"))
    assert resumed.train.precision == ("bf16" if bf16 else "fp32")
    begin_run(run, resumed, world=1, dataset=DATA)


@pytest.mark.parametrize("stored", [True, False, None])
@pytest.mark.parametrize("key", COMPILED)
def test_a_run_keeps_what_computes_its_parts(tmp_path: Path, key: str, stored: bool | None) -> None:
    began = settled(CONFIG, tmp_path, alone("cpu"))
    assert getattr(CONFIG.model, key) == "auto" and getattr(began.model, key) is True
    begin_run(tmp_path, began, world=1, dataset=DATA)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["model"][key]
    # Runs of versions without the key had the operations of PyTorch.
    content["model"] |= {} if stored is None else {key: stored}
    write_json(tmp_path / "config.json", content)
    write_checksums(tmp_path, ("config.json", "deepspeed.json"))
    assert getattr(load_run(tmp_path).model, key) is bool(stored)
    resumed = settled(CONFIG, tmp_path, alone("cpu"))
    assert getattr(resumed.model, key) is bool(stored)
    begin_run(tmp_path, resumed, world=1, dataset=DATA)
    other = changed(model={key: not stored})
    with pytest.raises(UserError, match=f"model.{key} = {str(bool(stored)).lower()} then"):
        begin_run(tmp_path, other, world=1, dataset=DATA)
    begin_run(tmp_path, CONFIG, world=1, dataset=DATA)


def test_a_run_resumes_with_settings_that_change_no_result(tmp_path: Path) -> None:
    begin_run(tmp_path, CONFIG, world=1, dataset=DATA)
    zero2 = tmp_path / "zero2.json"
    settings = load_deepspeed(CONFIG.train.deepspeed) | {"zero_optimization": {"stage": 2}}
    zero2.write_text(json.dumps(settings))
    raw = CONFIG.model_dump(mode="json")
    raw["features"]["item"]["sharding"] = "row_wise"
    raw["train"] |= {"deepspeed": str(zero2), "log_every": 7, "device": "cpu"}
    raw["checkpoint"] |= {"every_steps": 3}
    begin_run(tmp_path, parse_config(raw, "test"), world=2, dataset=DATA)
    assert load_run(tmp_path).train.log_every == 7
    zero2.write_text(json.dumps(settings | {"gradient_clipping": 0.5}))
    with pytest.raises(UserError, match=r"deepspeed gradient_clipping = 1\.0 then, 0\.5 now"):
        begin_run(tmp_path, parse_config(raw, "test"), world=2, dataset=DATA)


def test_a_run_of_an_earlier_version_loads_with_the_former_name_of_a_key(tmp_path: Path) -> None:
    begin_run(tmp_path, CONFIG, world=1, dataset=DATA)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["labels"]["disorder_seconds"] = stored["labels"].pop("max_out_of_orderness_seconds")
    (tmp_path / "config.json").write_text(json.dumps(stored))
    begin_run(tmp_path, CONFIG, world=1, dataset=DATA)
    assert load_run(tmp_path).labels == CONFIG.labels


def test_another_dataset_must_be_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin_run(tmp_path, CONFIG, world=1, dataset=DATA)
    other = DatasetEntry(path="e", fingerprint="abd")
    with pytest.raises(UserError, match="began with another dataset"):
        begin_run(tmp_path, CONFIG, world=1, dataset=other)
    assert capsys.readouterr().err == ""
    # Each start says so, since the key stays in the job and nothing is compared any more.
    for fingerprint in ("abd", "abe"):
        other = DatasetEntry(path="e", fingerprint=fingerprint)
        begin_run(tmp_path, changed(resume={"allow_new_data": True}), world=1, dataset=other)
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and f"{tmp_path}: resume.allow_new_data is true" in told and "code files" in told


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run here"):
        load_run(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_run(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), run_directory(tmp_path / "file" / "run", job="train"):
        pass


def test_without_a_directory_the_newest_unfinished_run_of_the_same_job_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deepspeed = {"deepspeed": str(Path(CONFIG.train.deepspeed).resolve())}
    config = changed(train=deepspeed)
    monkeypatch.chdir(tmp_path)
    fresh = choose_directory(config)
    assert fresh.parent == Path("runs") and fresh.name.startswith("n-2")
    for name, job in (
        ("n-1", config),
        ("n-2", config),
        ("n-3", config),
        ("n-4", changed(run={"seed": 9}, train=deepspeed)),
    ):
        (Path("runs") / name).mkdir(parents=True)
        begin_run(Path("runs") / name, job, world=1, dataset=DATA)
    (Path("runs") / "n-5").mkdir()
    assert choose_directory(config) == Path("runs/n-3")
    write_json(Path("runs/n-3/metrics.json"), {})
    assert choose_directory(config) == Path("runs/n-2")
    with_baseline = config.model_copy(update={"train": config.train.model_copy(update={"baselines": ("logistic",)})})
    assert choose_directory(with_baseline) == Path("runs/n-3"), "its baseline is not finished"
    started = subprocess.Popen([sys.executable, "-c", HOLD_LOCK, "runs/n-2"], stdout=subprocess.PIPE, text=True)
    try:
        assert started.stdout is not None and started.stdout.readline() == "locked\n"
        assert choose_directory(config) == Path("runs/n-1"), "another process runs in the one before"
        refused = pytest.raises(UserError, match=f"another job is running here .process {started.pid} on ")
        with refused, locked(Path("runs/n-2")):
            pass
    finally:
        started.kill()
        started.wait()
    assert choose_directory(config) == Path("runs/n-2"), "a lock does not outlive its owner"
    assert choose_directory(config.model_copy(update={"resume": ResumeConfig(enabled=False)})).name.startswith("n-2")
    named = config.model_copy(update={"run": config.run.model_copy(update={"directory": "a/b"})})
    assert choose_directory(named) == Path("a/b")


HOLD_LOCK = """
import os, sys, time
from pathlib import Path
from trainer.runtime.run_lock import locked
with locked(Path(sys.argv[1])):
    child = os.fork()
    if not child:
        time.sleep(2)  # As a forked loader process does, it outlives its parent; it must not keep the lock.
        os._exit(0)
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"threads": 7}, "threads in each rank, 7 before"),
        ({"kernels": "OTHER"}, "processors, OTHER before"),
        ({"packages": {"torch": "0.1", "deepspeed": None}}, ", 0.1 before"),
        ({"ranks": 2, "threads": 7}, None),
        ({"packages": "nonsense"}, None),
        ({}, None),
    ],
)
def test_a_resume_that_rounds_otherwise_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, Any], words: str | None
) -> None:
    begin_run(tmp_path, CONFIG, world=1, dataset=DATA)
    record = json.loads((tmp_path / "environment.json").read_text())
    record["starts"][-1] |= change
    write_json(tmp_path / "environment.json", record)
    begin_run(tmp_path, CONFIG, world=1, dataset=DATA)
    warnings = [entry.getMessage() for entry in caplog.records]
    if words is None:
        assert not warnings
    else:
        assert len(warnings) == 1 and words in warnings[0] and "\n" not in warnings[0]
        caplog.clear()
        begin_run(tmp_path, CONFIG, world=1, dataset=DATA)
        assert not caplog.records, "the environment did not change again"


def test_a_resume_on_a_processor_with_other_loops_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for instructions in ("AVX2", None):
        monkeypatch.setattr(vector_code, "INSTRUCTIONS", instructions)
        begin_run(tmp_path, changed(train={"device": "cpu"}), world=1, dataset=DATA)
    (warning,) = (entry.getMessage() for entry in caplog.records)
    for part in ("attention to histories", "experts and towers"):
        assert f"{part} by PyTorch's operations, by compiled loops (AVX2) before" in warning


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ({"compiled_attention": False}, "PyTorch's operations"),
        ({"compiled_attention": True}, "compiled loops (AVX2)"),
        ({}, "compiled loops (AVX2)"),
        ({"attention_kind": "multi_head", "compiled_attention": True}, ""),
    ],
)
def test_a_start_names_what_computes_an_attention_that_may_be_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: dict[str, Any], name: str
) -> None:
    monkeypatch.setattr(vector_code, "INSTRUCTIONS", "AVX2")
    config = changed(model=model, train={"device": "cpu"})
    begin_run(tmp_path, config, world=1, dataset=DATA)
    start = json.loads((tmp_path / "environment.json").read_text())["starts"][-1]
    assert start.get("attention", "") == compiled_parts(config).get("attention", "") == name
