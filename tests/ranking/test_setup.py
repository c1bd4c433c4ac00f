"""Split of a dataset in time, and the settings of a job that its engine gets."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.config.ranker import JobConfig, parse_config
from trainer.console.errors import UserError
from trainer.data.format.dataset import Dataset, selected_rows
from trainer.data.format.schema import DatasetSpec
from trainer.data.loading.batch_plan import ReadPlan
from trainer.data.simulator.write_dataset import simulate
from trainer.engine import build_engine
from trainer.engine.hybrid_engine import DenseOptimizer, TableOptimizer
from trainer.rank import run_job
from trainer.ranking import setup
from trainer.ranking.setup import loader_workers, split_in_time
from trainer.runtime.distributed import World
from trainer.runtime.preemption import Preemption

DAY_MS = 86_400_000
MAY_4 = 1_651_593_600_000
"""2022-05-04, 00:00 in Shanghai."""


def spec() -> DatasetSpec:
    return DatasetSpec(
        name="x",
        source="",
        licence="",
        partitions=1,
        timezone="Asia/Shanghai",
        behaviours=("click",),
        applies={"click": ("video",)},
        candidates=("video",),
        span_ms=(MAY_4 - 9 * DAY_MS, MAY_4 + 2 * DAY_MS - 1),
    )


def job(**data: str) -> JobConfig:
    return parse_config({"data": {"path": "x", **data}}, "test")


def test_training_ends_where_evaluation_begins() -> None:
    split = split_in_time(job(eval_from="2022-05-04", eval_until="2022-05-05"), spec())
    assert (split.train_until, split.eval_from, split.eval_until) == (MAY_4, MAY_4, MAY_4 + DAY_MS)
    assert split.training.emit_until == MAY_4
    assert (split.held_out.request_from, split.held_out.request_until) == (MAY_4, MAY_4 + DAY_MS)


def test_training_may_end_earlier_and_begin_later() -> None:
    split = split_in_time(job(train_from="2022-04-26", train_until="2022-05-02", eval_from="2022-05-04"), spec())
    assert (split.train_from, split.train_until) == (MAY_4 - 8 * DAY_MS, MAY_4 - 2 * DAY_MS)


def test_held_out_rows_can_be_of_one_domain_and_training_uses_both(tmp_path: Path) -> None:
    worlds = {rows: tmp_path / str(rows) for rows in (False, True)}
    for rows, path in worlds.items():
        simulate(path, 15, 3, 1, 1, video_rows=rows)
    read: dict[bool, tuple[list[int], list[int]]] = {}
    for rows, path in worlds.items():
        data = Dataset.open(str(path))
        settings = {"path": str(path), "eval_from": "2024-03-06", "eval_domains": ["live"]}
        split = split_in_time(parse_config({"data": settings}, "test"), data.spec)
        held_out, training = (
            sorted(visit for part in selected_rows(data, selection) for visit in part["visit_id"].tolist())
            for selection in (split.held_out, split.training)
        )
        read[rows] = held_out, training
        plan = ReadPlan(data.store, [0], split.held_out, batch_size=8, seed=1)
        assert plan.rows_total == len(held_out), "the index of the rows does not know the domains"
    assert read[True][0] == read[False][0] != []
    # A tenth of the exposures are of rooms.
    assert set(read[True][1]) > set(read[False][1]) and len(read[True][1]) > 5 * len(read[False][1])


def test_a_domain_without_rows_is_refused() -> None:
    config = parse_config({"data": {"path": "x", "eval_from": "2022-05-04", "eval_domains": ["live"]}}, "test")
    with pytest.raises(
        UserError, match=r"data\.eval_domains names 'live', which has no rows: those of 'x' are of video"
    ):
        split_in_time(config, spec())


def test_without_a_held_out_range_all_is_trained_on() -> None:
    split = split_in_time(job(), spec())
    assert split.eval_from is None
    assert split.train_until > spec().span_ms[1] + 365 * DAY_MS
    with pytest.raises(ValueError, match="no held-out range"):
        _ = split.held_out


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            {"train_until": "2022-05-05", "eval_from": "2022-05-04"},
            "eval_from = '2022-05-04' is before data.train_until",
        ),
        ({"train_from": "2022-05-04", "eval_from": "2022-05-04"}, "train_from = '2022-05-04' is not before the end"),
        ({"eval_from": "2022-05-04", "eval_until": "2022-05-04"}, "eval_until = '2022-05-04' is not after"),
        ({"eval_from": "2022-06-04"}, "is after the dataset's last request"),
        ({"eval_from": "May"}, "data.eval_from = 'May': not a time"),
    ],
)
def test_ranges_that_cannot_be_are_refused(data: dict[str, str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        split_in_time(job(**data), spec())


def test_weights_and_rates_reach_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of the losses are in the order of the behaviours that the model predicts, and 1 where none is set."""
    arguments: dict[str, Any] = {}
    monkeypatch.setattr(setup, "build_ranker", lambda *arguments: None)
    monkeypatch.setattr(build_engine, "HybridEngine", lambda *tables, **options: arguments.update(options))
    config = parse_config(
        {
            "data": {"path": "x"},
            "train": {"weights": {"gift": 3.0, "click": 0.5}, "batch_size": 64},
            "tables": {"learning_rate": 0.2, "eps": 1e-4, "optimizer": "adagrad"},
            "optimizer": {"learning_rate": 0.01, "weight_decay": 0.3, "betas": [0.8, 0.95]},
        },
        "test",
    )
    layout = SimpleNamespace(content=())
    features: Any = SimpleNamespace(
        behaviours=("click", "like", "gift"), tables=[], lookups=[], sequences=[], layout=layout
    )
    world: Any = SimpleNamespace(size=2, device=torch.device("cpu"))
    setup.build_engine(config, features, "ple", world)
    assert arguments["loss"].weights.tolist() == [0.5, 1.0, 3.0]
    assert arguments["table_optimizer"] == TableOptimizer("adagrad", 0.2, 1e-4)
    assert arguments["dense_optimizer"] == DenseOptimizer(0.01, 0.3, (0.8, 0.95))
    assert arguments["batch_size"] == 32 and arguments["alignment"] is None


def test_a_machine_without_a_compiler_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(tmp_path / "world", users=30, days=2, partitions=2, seed=2)
    monkeypatch.setattr(setup, "compiler_problem", lambda device: None)
    monkeypatch.setattr(World, "first_problem", lambda world, problem: "on b (rank 8): train.compile = true: no C++")
    config = parse_config(
        {
            "data": {"path": str(tmp_path / "world")},
            "run": {"directory": str(tmp_path / "run")},
            "train": {"compile": True, "device": "cpu"},
        },
        "test",
    )
    with World.join("cpu") as world, pytest.raises(UserError, match=r"^on b \(rank 8\): train\.compile = true: no C\+"):
        run_job(config, world, Preemption())
    assert not (tmp_path / "run").exists()


def test_the_limit_of_retractions_reaches_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a late positive at p = 0.8, with a limit of 2 and by default, is that of the job file."""
    made: list[Any] = []
    monkeypatch.setattr(setup, "make_engine", lambda *arguments, compiled: made.append(arguments[4]))
    for name in ("build_ranker", "build_alignment"):
        monkeypatch.setattr(setup, name, lambda *arguments: None)
    features: Any = SimpleNamespace(behaviours=("click",), tables=(), lookups=(), layout=SimpleNamespace(content=()))
    world: Any = SimpleNamespace(device=torch.device("cpu"))
    one: Any = SimpleNamespace(label=torch.ones(1, 1), mask=torch.ones(1, 1), slow=torch.tensor([True]))
    batch: Any = SimpleNamespace(dense=torch.zeros(1, 0))
    slopes = []
    for labels in ({"retraction_limit": 2.0}, {}):
        sections = {
            "data": {"path": "x", "train_until": "2022-05-04"},
            "stream": {},
            "labels": {"policy": "fast_slow", **labels},
        }
        config = parse_config(sections, "test")
        setup.build_engine(config, features, "ple", world)
        logits = torch.logit(torch.tensor([[0.8]])).requires_grad_()
        loss = made[-1].begin(batch, [one], lambda part: part.label)(0, logits)
        slopes.append(torch.autograd.grad(loss, logits)[0].item())
    assert slopes == pytest.approx([-0.4, -1])


@pytest.mark.parametrize(
    ("device", "cores", "free_gb", "settings", "expected"),
    [
        # Two threads of the network on a CPU, one on a GPU.
        ("cpu", 2, 100, {}, 1),
        ("cpu", 6, 100, {}, 4),
        ("cuda", 6, 100, {}, 5),
        ("cuda", 64, 100, {}, 8),
        ("cuda", 1, 100, {}, 1),
        # Shared memory for both ranks of the machine, and the versions of the search vectors.
        ("cuda", 64, 1, {}, 1),
        ("cuda", 64, 2, {}, 3),
        ("cuda", 64, 100, {"refresh_steps": 20}, 4),
        ("cuda", 64, 100, {"refresh_steps": 3}, 1),
        ("cuda", 64, 100, {"workers": 0}, 0),
        ("cpu", 1, 0, {"workers": 12}, 12),
    ],
)
def test_loader_processes_follow_the_cores_of_the_rank(
    monkeypatch: pytest.MonkeyPatch, device: str, cores: int, free_gb: int, settings: dict[str, int], expected: int
) -> None:
    data = {"path": "d", **{name: value for name, value in settings.items() if name == "workers"}}
    search = {name: value for name, value in settings.items() if name == "refresh_steps"}
    config = parse_config({"data": data, "features": {"search": search}}, "job")
    world: Any = SimpleNamespace(device=torch.device(device), cores=cores, place_on_machine=lambda: (0, 2))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda path: SimpleNamespace(free=free_gb * 10**9))
    assert loader_workers(config, world) == expected
