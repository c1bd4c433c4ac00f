"""The benchmark of throughput trains Limelight and its peers on the same rows, and measures what each has learnt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.speed import limelight_training, machine_rates, throughput, workload
from benchmarks.speed.peers import pytorch
from trainer.data.format.history import Histories
from trainer.data.format.schema import DatasetSpec
from trainer.data.format.shards import RowStore
from trainer.data.loading.loader import Loader
from trainer.runtime.phase_timer import PHASES

SMALL = ["--scale=512", "--repeats=2"]
BATCH, ROWS = throughput.BATCH // 512, workload.ROWS // 512
PYTHONS = {"rechub-ple": "LIMELIGHT_RECHUB_PYTHON", "rechub-din": "LIMELIGHT_RECHUB_PYTHON"} | {
    "fuxictr": "LIMELIGHT_FUXICTR_PYTHON",
    "tzrec": "LIMELIGHT_TZREC_PYTHON",
    "tzrec-sharded": "LIMELIGHT_TZREC_PYTHON",
}
"""Peer -> variable that names the Python of its virtual environment."""


def check(written: dict[str, Any], systems: Sequence[tuple[str, str]]) -> None:
    assert [(found["setup"], found["system"]) for found in written["results"]] == list(systems)
    for found in written["results"]:
        rate = found["rows_per_second"]
        assert len(found["runs"]) == written["settings"]["repeats"] and 0 < rate["least"] <= rate["median"]
        assert rate["median"] <= rate["most"] == max(run["rows_per_second"] for run in found["runs"])
        for run in found["runs"]:
            assert run["rows"] == ROWS - throughput.WARM_UP_STEPS * BATCH
            assert {"load_before", "load_after", "cores_of_others", "product_gflops"} <= run.keys()
            assert set(run["auc"]) == set(workload.BEHAVIOURS) and all(0 <= auc <= 1 for auc in run["auc"].values())
        if found["system"].startswith("limelight"):
            assert set(found["shares"]) == set(PHASES)
            assert {table["table"] for table in found["runs"][0]["plan"]} == {"user", "author", "item", "side"}
    assert all(0.5 < best <= 1 for best in written["best_possible_auc"].values())


def test_limelight_and_the_plain_loop_on_one_rank(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = subprocess.run

    def run_here(command: Sequence[str], check: bool, **options: Any) -> object:
        if command[0] != sys.executable:
            return run(command, check=check, **options)
        env = options["env"]
        assert check and env["OMP_NUM_THREADS"] == "1" and command[0] == sys.executable
        if "benchmarks.speed.throughput" in command:
            throughput.main(command[command.index("--one") :])
        else:
            monkeypatch.setenv("OMP_NUM_THREADS", "1")
            assert command[1].endswith("peers/pytorch.py")
            pytorch.run(command[2], Path(command[3]), Path(command[4]))
        return None

    monkeypatch.setattr(throughput.subprocess, "run", run_here)
    monkeypatch.setattr(throughput, "machine_rates", lambda threads: {"product_gflops": 100.0})
    systems = ["limelight-fp32", "pytorch", "pytorch-sparse"]
    out = tmp_path / "results" / "throughput.json"
    throughput.main([*SMALL, "--setups", "1x1", "--systems", *systems, f"--out={out}"])
    written = json.loads(out.read_text())
    check(written, [("1x1", system) for system in systems])
    lines = capsys.readouterr().out.splitlines()
    order = [line.split(":")[0] for line in lines if line.endswith("rows/s")]
    assert order == [f"1x1 {system}" for system in systems] * 2, "the systems run by turns"


@pytest.mark.slow
def test_both_on_two_ranks(tmp_path: Path) -> None:
    out = tmp_path / "throughput.json"
    systems = ["limelight-fp32", "limelight-bf16", "pytorch-sparse"]
    throughput.main([*SMALL, "--setups", "2x1", "--systems", *systems, f"--out={out}"])
    check(json.loads(out.read_text()), [("2x1", system) for system in systems])


@pytest.mark.parametrize("name", PYTHONS)
def test_a_peer_trains_on_the_same_rows(tmp_path: Path, name: str) -> None:
    python = os.environ.get(PYTHONS[name])
    if python is None:
        pytest.skip(f"{PYTHONS[name]} names no Python that has {name.partition('-')[0]}")
    parts = {part: workload.make_rows(rows, 512, seed) for seed, (part, rows) in enumerate(_SIZES.items())}
    workload.write_arrays(tmp_path, parts, BATCH, 512, throughput.WARM_UP_STEPS)
    out = throughput.start(throughput.SYSTEMS[name], python, tmp_path, 1, 1, BATCH)
    with np.load(out) as found:
        assert found["rows"] == 64 - throughput.WARM_UP_STEPS * BATCH and found["seconds"] > 0
        assert found["probability"].shape == (32, len(found["behaviours"]))
        assert ((found["probability"] > 0) & (found["probability"] < 1)).all()


_SIZES = {"train": 64, "held_out": 32}


def test_a_peer_whose_python_is_not_named_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--systems", "fuxictr"], "fuxictr needs --fuxictr-python PATH"),
        (["--rows", "8192"], "--rows 8192: give more than 8,192"),
    ):
        with pytest.raises(SystemExit):
            throughput.main(arguments)
        assert message in capsys.readouterr().err


def test_a_machine_with_gpus_has_a_rank_on_each_and_steps_that_fill_them(capsys: pytest.CaptureFixture[str]) -> None:
    on_cpu = throughput.default_settings(gpus=0, cores=2)
    assert on_cpu == throughput.ThroughputSettings(("1x1", "1x2", "2x1"), throughput.BATCH, workload.ROWS, workers=0)
    assert throughput.default_settings(gpus=1, cores=16).setups == ("1x4",)
    eight = throughput.default_settings(gpus=8, cores=24)
    assert eight.setups == ("1x3", "8x3") and eight.workers == 2
    assert eight.rows // eight.batch > 100 + throughput.WARM_UP_STEPS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(SystemExit):
            throughput.main(["--setups", "4x1"])
    assert "--setups 4x1: there are 2 GPUs, one for each rank" in capsys.readouterr().err


def test_the_share_of_the_device_is_of_products_in_the_precision_of_the_system() -> None:
    rates = machine_rates.device_rates(torch.device("cpu"), size=16)
    assert set(rates["device_product_gflops"]) == {"fp32", "tf32", "bf16"}
    assert min(*rates["device_product_gflops"].values(), rates["device_copy_gb_per_second"]) > 0
    products = {"fp32": 1e3, "tf32": 4e3, "bf16": 8e3}
    run = {"rows_per_second": 1e6, "auc": {"click": 0.7}, "product_gflops": 10.0, "device_product_gflops": products}
    one, two, peer = (
        throughput.summary(setup, system, [run])["share_of_product_rate"]
        for setup, system in (("1x4", "limelight-bf16"), ("2x4", "limelight-bf16"), ("1x4", "pytorch-sparse-tf32"))
    )
    assert one == pytest.approx(1e6 * throughput.FLOP_PER_ROW / 8e12)
    assert (two, peer) == pytest.approx((one / 2, 2 * one))


def test_a_peer_of_another_environment_gets_none_of_our_packages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands = []

    def run(command: Sequence[str], check: bool, env: Mapping[str, str]) -> None:
        commands.append((list(command), env))

    monkeypatch.setattr(subprocess, "run", run)
    throughput.start(throughput.SYSTEMS["fuxictr"], "/venv/python", tmp_path, 1, 2, 8)
    throughput.start(throughput.SYSTEMS["pytorch"], sys.executable, tmp_path, 2, 1, 8)
    (peer, environment), (plain, _) = commands
    assert peer == ["/venv/python", str(throughput.PEERS / "fuxi.py"), "ple", str(tmp_path), str(tmp_path / "out.npz")]
    assert "PYTHONPATH" not in environment and environment["OMP_NUM_THREADS"] == "2"
    assert "--nproc-per-node=2" in plain


def test_the_plain_ranker_s_attention_and_experts_are_what_they_say() -> None:
    torch.manual_seed(0)
    din = pytorch.TutorialDin(4, (8, 3))
    query, keys = torch.randn(2, 4), torch.randn(2, 5, 4)
    expected = []
    for row in range(2):
        parts = [torch.cat([query[row], key, query[row] - key, query[row] * key]) for key in keys[row]]
        share = torch.stack([din.score(part) for part in parts]).softmax(0)
        expected.append((share * keys[row]).sum(0))
    torch.testing.assert_close(din(query, keys), torch.stack(expected))
    layer = pytorch.TutorialPle(4, tasks=2, own=2, shared=1, widths=(6, 3), last=False)
    found = layer([query] * 3)
    assert [tuple(out.shape) for out in found] == [(2, 3)] * 3
    one = torch.stack([expert(query) for expert in [*layer.own[1], *layer.shared]], 1)  # type: ignore[misc]
    torch.testing.assert_close(found[1], (layer.gates[1](query).softmax(1)[:, :, None] * one).sum(1))
    assert len(pytorch.TutorialPle(4, 2, 2, 1, (6, 3), last=True)([query] * 3)) == 2


def test_labels_depend_on_dense_values_and_histories() -> None:
    rows = workload.make_rows(20_000, 512, seed=3)
    assert np.array_equal(rows.ids["user"], rows.users[rows.history_of])
    popular = rows.past_author < workload.POPULAR
    topic = np.where(popular, rows.past_author % workload.TOPICS, -1)
    preferred = np.array([np.bincount(row[row >= 0], minlength=workload.TOPICS).argmax() for row in topic])
    author = rows.ids["author"]
    of_topic = (author < workload.POPULAR) & (author % workload.TOPICS == preferred[rows.history_of])
    assert (rows.probability[of_topic].mean(0) > rows.probability[~of_topic].mean(0) + 0.1).all()
    again = workload.make_rows(20_000, 512, seed=3)
    assert (again.label == rows.label).all() and (again.dense == rows.dense).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_features_are_the_peers_inputs(tmp_path: Path, workers: int) -> None:
    made = workload.make_rows(64, 2048, seed=1)
    workload.write_dataset(tmp_path / "rows", made, scale=2048)
    workload.write_arrays(tmp_path, {"train": made}, 16, 2048, 1)
    arrays = np.load(tmp_path / "train.npz")
    spec = DatasetSpec.load(tmp_path / "rows")
    features = limelight_training.WorkloadFeatures(spec)
    store, histories = RowStore(tmp_path / "rows", spec), Histories(tmp_path / "rows", spec)
    loader = Loader(store, histories, features, rank=0, world=1, batch_size=16, seed=1, workers=workers)
    rows = 0
    for batch in loader:
        (keyed,) = batch.ids
        values = dict(zip(keyed.keys(), keyed.values().split(keyed.length_per_key()), strict=True))
        at = batch.visit_id.numpy()
        offsets = np.cumsum([0] + [count for _, count in workload.SIDE])
        side = values["side"].view(-1, 3).numpy() - offsets[:-1]
        for name in ("user", "author", "item"):
            assert (values[name].numpy() == arrays[name][at]).all()
        for column, (name, _) in enumerate(workload.SIDE):
            assert (side[:, column] == arrays[name][at]).all()
        for name in ("past_author", "past_item"):
            of_rows = values[name].view(-1, workload.LENGTH).numpy()
            assert (np.sort(of_rows, 1) == np.sort(arrays[name][at], 1)).all()
        assert (batch.label.numpy() == arrays["label"][at]).all()
        rows += batch.rows
    assert rows == 64
