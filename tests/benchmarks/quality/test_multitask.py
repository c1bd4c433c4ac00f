"""The benchmark of networks with several behaviours: equal sizes, one difference, and main measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality.multitask import (
    CGC,
    NETWORKS,
    PLE,
    TASKS,
    TWO,
    WIDTH,
    NetworkSetting,
    job_of,
    main,
    sizes,
    tables,
)
from trainer.data.format.schema import DatasetSpec
from trainer.data.simulator.write_dataset import simulate
from trainer.runtime.distributed import World

SMALL = ["model.tower=[4]", "model.attention=[4]", "train.batch_size=64"]
SMALL += ["model.compiled_attention=false", "model.compiled_experts=false"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("multitask") / "world"
    simulate(path, 30, 10, 2, 1)
    return path


@pytest.mark.parametrize("tasks", TASKS)
def test_networks_have_the_size_of_ple(world: Path, tasks: str) -> None:
    setting = NetworkSetting(30, 0.0, tasks)
    with World.join("cpu") as ranks:
        found = sizes(setting, world, [], ranks)
    assert list(found) == list(NETWORKS) and found[PLE][0] == WIDTH
    for network, (width, parameters) in found.items():
        assert parameters == pytest.approx(found[PLE][1], rel=0.03), network
        assert network == PLE or width > WIDTH, "a second layer costs parameters, and so does an expert for each task"


def test_rankers_differ_in_the_network_only(world: Path) -> None:
    setting = NetworkSetting(30, 0.0, TWO)
    jobs = {network: job_of(network, 9, setting, 2, world, []) for network in NETWORKS}
    for network, job in jobs.items():
        same = job.model.model_copy(update={"kind": CGC})
        assert job.model.kind == network and job.model_copy(update={"model": same}) == jobs[CGC]
        assert job.data.behaviours == ("click", "like") and job.run.seed == 2


def test_main_trains_once_and_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, work = tmp_path / "multitask.json", tmp_path / "work"
    arguments = [*SMALL, "--work", str(work), "--out", str(out), "--users", "30", "--conflicts", "1", "--seeds", "1"]
    arguments += ["--tasks", TWO]
    main(arguments)
    result: dict[str, Any] = json.loads(out.read_text())
    (setting,) = result["settings"].values()
    assert DatasetSpec.load(work / "world-30-1").extra["conflict"] == 1
    assert set(setting["behaviours"]) == {"click", "like"} and set(setting["recipes"]) == set(NETWORKS)
    difference = setting["behaviours"]["click"]["recipes"][PLE]["auc_difference"]
    assert difference["low"] <= difference["mean"] <= difference["high"] and len(difference["seeds"]) == 1
    assert setting["parameters"][PLE] == pytest.approx(setting["parameters"]["shared_bottom"], rel=0.03)
    printed = capsys.readouterr()
    assert tables(result) in printed.out and printed.err.count(", seed 1\n") == len(NETWORKS)
